"""Distillation and evaluation text: files, datasets or token ids → tokens, and where each document begins."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..passes.distil.retrieval import Needles
from ..passes.errors import LincompileError
from .tokenizer import TextCodec, codec_of, valid

SEPARATOR = "\n\n"
NEEDLES = 512
DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Corpus:
    """A text's tokens: ``ids`` int64 ``[N]``, and where each document begins in them, ``[D]``.

    ``empty``: rows of the source without text, which were passed over.
    """

    ids: Tensor
    documents: Tensor
    empty: int = 0


def read_tokens(source: Any, tokenizer: Callable[[Path], None] | None) -> Tensor:
    """Token ids of all documents as one text, blank lines between them, int64 ``[N]``.

    Args:
        source: token ids (a tensor), a list of texts, a ``.txt``, ``.md``, ``.json`` (a list of texts), ``.jsonl`` or
            ``.ndjson`` (key "text"), ``.parquet`` (column "text") or ``.npy`` (token ids) file, or ``hf:name`` (a
            Hugging Face dataset, split train).
        tokenizer: writes the model's tokenizer into a folder.

    Raises:
        LincompileError: a missing or unreadable file, or text for a model without a tokenizer.
    """
    if (ids := _ready(source)) is not None:
        return ids
    return torch.tensor(_codec(tokenizer).encode(read_text(source)), dtype=torch.int64)


def read_text(source: Any) -> str:
    """All documents as one text, blank lines between them. Args and errors: as ``read_tokens``, without token ids."""
    return SEPARATOR.join(_documents(source)[0])


def read_corpus(source: Any, tokenizer: Callable[[Path], None] | None) -> Corpus:
    """The documents of a text, tokenized one by one (a text file, or token ids, are one document).

    Args and errors: as ``read_tokens``; also an error where the text is empty.
    """
    if (ids := _ready(source)) is not None:
        return Corpus(ids, torch.zeros(1, dtype=torch.int64))
    texts, empty = _documents(source)
    codec = _codec(tokenizer)
    pieces: list[Tensor] = []
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):  # Python's numbers take several times a tensor's memory
        pieces += map(torch.tensor, codec.encode_all(texts[start : start + DOCUMENTS_AT_ONCE]))
    lengths = torch.tensor([len(piece) for piece in pieces])
    flat = torch.cat(pieces).long()
    return Corpus(flat, lengths.cumsum(0) - lengths, empty)


def needles_of(tokenizer: Callable[[Path], None] | None, kind: str, ids: Tensor, seed: int) -> Needles:
    """What retrieval examples are made of.

    Args:
        kind: ``facts``, numbers given to the text's words (spans of its tokens where there is no tokenizer), or
            ``passkeys``, the prompts of ``lincompile eval --passkey`` with keys of their own.
        ids: tokens of the training text.

    Raises:
        LincompileError: pass keys without a tokenizer, or for one without digits.
    """
    if kind == "passkeys":
        from .evaluation.passkey import Prompts

        return Prompts(_codec(tokenizer), "any text").needles(seed)
    return Needles.from_spans(ids, seed) if tokenizer is None else retrieval_needles(tokenizer, ids, seed)


def retrieval_needles(tokenizer: Callable[[Path], None], ids: Tensor, seed: int) -> Needles:
    """Sentences that give a word of the text a number, and the same sentences again to be completed.

    Args:
        ids: tokens of the training text, whose words are used.
    """
    codec = _codec(tokenizer)
    generator = random.Random(seed)
    middle = max(0, ids.numel() // 2 - 20_000)
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", codec.decode(ids[middle : middle + 40_000].tolist()))))
    if len(words) < 16:
        return Needles.from_spans(ids, seed)
    chosen = generator.sample(words, min(NEEDLES, len(words)))
    begun = [f"\nFor {word}, note down" for word in chosen]
    whole = [f"{cue} {generator.randrange(1000, 1_000_000)}.\n" for cue in begun]
    cues, facts = (codec.encode_all(texts, special=False) for texts in (begun, whole))
    # Where the tokenizer joins the cue's end to the number, all of the sentence counts.
    asked = [len(fact) - (len(cue) if fact[: len(cue)] == cue else 0) for cue, fact in zip(cues, facts, strict=True)]
    sentences = [torch.tensor(fact) for fact in facts]
    return Needles(sentences, sentences, asked)


def holds_ids(source: str | Path) -> bool:
    """Whether a file's name says that it holds token ids, not text."""
    return Path(source).suffix.lower() == ".npy"


def existing(source: str | Path) -> Path:
    """The path of a file that exists; a ``LincompileError`` otherwise."""
    path = Path(source)
    if not path.is_file():
        raise LincompileError(f"the text file {path} doesn't exist")
    return path


def read_texts(source: str) -> Iterator[str]:
    """The documents of a file or dataset, in order (an empty row is an empty text).

    Raises:
        LincompileError: a missing or unreadable file, a table without a column "text", a row that isn't text.
    """
    if source.startswith("hf:"):
        try:
            from datasets import load_dataset
        except ImportError:
            raise LincompileError("hf: datasets need the 'datasets' package: pip install 'lincompile[hf]'") from None
        dataset = load_dataset(source[3:], split="train")
        _column("text", dataset.column_names, source)
        yield from (_text(row["text"], f"{source}: row {i}") for i, row in enumerate(dataset, 1))
        return
    path = existing(source)
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as lines:  # JSON strings may hold what splitlines() splits at
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _row(_parsed(line, f"{path}: line {number}"), f"{path}: line {number}")
        elif kind == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise LincompileError(f"the text file {path} holds no list: write a list of texts")
            yield from (
                row if isinstance(row, str) else _row(row, f"{path}: item {number}")
                for number, row in enumerate(rows, 1)
            )
        else:
            yield path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, OSError) as error:
        raise LincompileError(f"the text file {path} can't be read: {type(error).__name__}: {error}") from error


def _ready(source: Any) -> Tensor | None:
    """Ids that need no tokenizer, ``[N]``."""
    if isinstance(source, Tensor):
        ids = source.flatten().long()
    elif isinstance(source, (str, Path)) and holds_ids(source):
        import numpy as np

        path = existing(source)
        try:
            values = np.load(path)
        except (ValueError, OSError, EOFError) as error:
            raise LincompileError(f"the token file {path} can't be read: {error}") from error
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
            held = values.dtype if isinstance(values, np.ndarray) else "several arrays (.npz)"
            raise LincompileError(f"the token file {path} holds {held}: token ids are one array of integers")
        if values.size and int(values.max()) > torch.iinfo(torch.int64).max:
            raise LincompileError(f"the token file {path} holds {int(values.max())}, which is no token id")
        ids = torch.from_numpy(values.astype("int64")).flatten()
    else:
        return None
    if not ids.numel():
        raise LincompileError("the text holds no tokens")
    return ids


def _documents(source: Any) -> tuple[list[str], int]:
    """The documents with text in them, and how many rows had none."""
    rows = list(source) if isinstance(source, (list, tuple)) else list(read_texts(str(source)))
    texts = [_text(row, f"item {number} of the list") for number, row in enumerate(rows, 1)]
    filled = [text for text in texts if text.strip()]
    if not filled:
        raise LincompileError(
            f"the text {source if isinstance(source, (str, Path)) else ''} is empty".replace("  ", " ")
        )
    return filled, len(texts) - len(filled)


def _codec(tokenizer: Callable[[Path], None] | None) -> TextCodec:
    if tokenizer is None:
        raise LincompileError(
            "the model came without a tokenizer: give token ids instead of text (a .npy file of integers)"
        )
    return codec_of(tokenizer)


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise LincompileError(f"{path} needs the 'pyarrow' package: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        _column("text", file.schema_arrow.names, path)
        rows = file.read(columns=["text"])["text"].to_pylist()
    except ArrowException as error:
        raise LincompileError(f"the text file {path} can't be read: {error}") from error
    yield from (_text(row, f"{path}: row {number}") for number, row in enumerate(rows, 1))


def _column(name: str, found: list[str], where: Any) -> None:
    if name not in found:
        raise LincompileError(
            f"{where} has no column '{name}' but {', '.join(found) or 'none'}: rename the text's column"
        )


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise LincompileError(f"{where} can't be read as JSON: {why}") from error


def _row(row: Any, where: str) -> str:
    if not isinstance(row, dict) or "text" not in row:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise LincompileError(f"{where} has no key 'text' but {keys or 'none'}: name the text's key 'text'")
    return _text(row["text"], where)


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LincompileError(f"{where} holds a {type(value).__name__} where text is wanted: {str(value)[:40]!r}")
    return valid(value, where)
