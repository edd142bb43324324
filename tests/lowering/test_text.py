"""Text for training: documents of every kind of file, and what is said about files that aren't as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lincompile.lowering.text import read_corpus, read_texts, read_tokens, retrieval_needles
from lincompile.lowering.tokenizer import TextCodec
from lincompile.passes.errors import LincompileError

tokenizers = pytest.importorskip("tokenizers")


def tokenizer(folder: Path) -> None:
    """A tokenizer of words, each known one a token, with a first token for every text."""
    words = ["<s>", "<unk>", "\n", "one", "two", "three", "four", "five", "six", "seven"]
    words += ["For", ",", "note", "down", "."]
    words += [str(i) for i in range(10)] + [f"word{chr(97 + i)}" for i in range(26)]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"\n|\d|[,.]|[a-zA-Z]+"), "removed", invert=True
    )
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))


def written(path: Path, rows: Any) -> str:
    kind = path.suffix.lower()
    if kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(rows), path)
    elif kind in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows) if kind == ".json" else rows)
    return str(path)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.jsonl", [{"text": "one two"}, {"text": " "}, {"text": "three four five"}, {"text": None}]),
        ("a.json", ["one two", "", "three four five", {"text": ""}]),
        ("a.parquet", {"other": [1, 2, 3, 4], "text": ["one two", None, "three four five", ""]}),
        ("A.JSONL", [{"text": "one two"}, {"text": " "}, {"text": "three four five"}, {"text": None}]),
        ("a.ndjson", [{"text": "one two"}, {"text": " "}, {"text": "three four five"}, {"text": None}]),
        ("A.Parquet", {"text": ["one two", None, "three four five", ""]}),
    ],
)
def test_each_row_is_a_document_and_empty_ones_are_counted(tmp_path: Path, name: str, rows: Any) -> None:
    corpus = read_corpus(written(tmp_path / name, rows), tokenizer)
    assert corpus.ids.tolist() == [0, 3, 4, 0, 5, 6, 7], "each with the token that texts begin with"
    assert corpus.documents.tolist() == [0, 3] and corpus.empty == 2


def test_line_separators_within_a_row_and_marks_before_the_first(tmp_path: Path) -> None:
    """JSON may hold U+2028 and its like unescaped, and editors begin files with a byte order mark."""
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028two"}, {"text": "three\x85four\u2029five"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8-sig")
    assert len(read_corpus(str(path), tokenizer).documents) == 2
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("one two", encoding="utf-8")
    marked.write_text("one two", encoding="utf-8-sig")
    assert read_corpus(str(marked), tokenizer).ids.tolist() == read_corpus(str(plain), tokenizer).ids.tolist()


def test_a_text_file_and_token_ids_are_one_document(tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", "one two\n\nthree")
    assert read_corpus(file, tokenizer).documents.tolist() == [0]
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint16).reshape(2, 3))
    for source in (str(tmp_path / "a.npy"), torch.arange(6).view(2, 3)):
        corpus = read_corpus(source, None)
        assert corpus.ids.tolist() == list(range(6)) and corpus.documents.tolist() == [0]
    assert read_corpus(["one", "two three"], tokenizer).documents.tolist() == [0, 2]


def test_tokens_of_one_text_have_blank_lines_between_documents() -> None:
    assert read_tokens(["one", " ", "two"], tokenizer).tolist() == [0, 3, 2, 2, 4]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.parquet", {"content": ["x"], "id": [1]}, r"a\.parquet has no column 'text' but content, id: rename"),
        ("a.parquet", {"text": [1, 2]}, r"a\.parquet: row 1 holds a int where text is wanted: '1'"),
        ("a.jsonl", [{"text": "x"}, {"body": "x"}], r"a\.jsonl: line 2 has no key 'text' but body: name the text's"),
        ("a.jsonl", [["x"]], r"a\.jsonl: line 1 has no key 'text' but a list"),
        ("a.jsonl", [{"text": ["x"]}], r"line 1 holds a list where text is wanted"),
        ("a.json", {"text": "x"}, r"a\.json holds no list: write a list of texts"),
        ("a.json", ["x", 3], r"item 2 has no key 'text' but a int"),
        ("a.jsonl", [{"text": "x"}, {"text": "a\udc00"}], r"line 2 isn't valid Unicode: character 2 is '\\udc00'"),
        ("a.jsonl", [{"text": ""}, {"text": None}], r"the text .*a\.jsonl is empty"),
        ("a.txt", " \n", r"the text .*a\.txt is empty"),
    ],
)
def test_rows_that_are_no_text_are_named(tmp_path: Path, name: str, rows: Any, message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        read_corpus(written(tmp_path / name, rows), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"not parquet at all", r"a\.parquet can't be read"),
        ("a.jsonl", b'{"text": "x"}\n{"te', r"a\.jsonl: line 2 can't be read as JSON: Unterminated string"),
        ("a.txt", b"\xff\xfe\xff", r"a\.txt can't be read: UnicodeDecodeError"),
        ("a.npy", b"no array", r"a\.npy can't be read"),
        ("a.json", b"[" * 100_000, r"a\.json can't be read: RecursionError"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LincompileError, match=message):
        read_corpus(str(tmp_path / name), tokenizer)
    with pytest.raises(LincompileError, match=r"missing\.txt doesn't exist"):
        list(read_texts(str(tmp_path / "missing.txt")))


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros(0, dtype=np.int64)])
def test_arrays_without_token_ids_are_refused(tmp_path: Path, values: Any) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(LincompileError, match=r"holds float64: token ids are one array of integers|holds no tokens"):
        read_corpus(str(tmp_path / "a.npy"), None)


def test_numbers_that_no_token_has_and_several_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2**63], dtype=np.uint64))
    with pytest.raises(LincompileError, match="holds 9223372036854775808, which is no token id"):
        read_corpus(str(tmp_path / "a.npy"), None)
    np.savez(tmp_path / "b.npz", np.arange(3))
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(LincompileError, match=r"holds several arrays \(\.npz\): token ids are one array"):
        read_corpus(str(tmp_path / "b.npy"), None)


def test_prompts_that_are_no_unicode_are_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    for text in ("a\udcff", "\ud800"):
        with pytest.raises(LincompileError, match=r"the text isn't valid Unicode: character \d is"):
            TextCodec(tmp_path).encode(text)


def test_needles_give_words_of_the_text_numbers() -> None:
    ids = torch.arange(25, 51).repeat(30)
    made, again = (retrieval_needles(tokenizer, ids, seed=1) for _ in range(2))
    assert len(made.facts) == 26 and all(map(torch.equal, made.facts, again.facts))
    fact = made.facts[0].tolist()
    assert 0 not in fact and 1 not in fact, "no first token, and nothing unknown"
    assert all(0 < asked < len(whole) for asked, whole in zip(made.asked, made.answers, strict=True))
    words = {tuple(found.tolist()[2:3]) for found in made.facts}
    assert len(words) == len(made.facts), "no word has two numbers"
