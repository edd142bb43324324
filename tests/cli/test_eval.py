"""``lincompile eval`` beyond perplexity: passkey retrieval and continuations, on a tiny model with a real tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_llama

from .conftest import Run

pytest.importorskip("transformers")
Tokenizer, processors = pytest.importorskip("tokenizers").Tokenizer, pytest.importorskip("tokenizers").processors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def student(folder: Path) -> Path:
    import lincompile

    return lincompile.compile(folder, attn="lawcat").save(folder.parent / "student")


def test_passkey_by_one_code_path(cli: Run, folder: Path, student: Path, tmp_path: Path) -> None:
    options = ("--passkey", "--lengths", "350,400", "--depths", 3, "--trials", 2, "--json")
    for model in (folder, student):
        document = cli("eval", model, *options, "--plot", tmp_path / "map.html").json
        assert [(cell["length"], cell["depth"]) for cell in document["cells"]] == [
            (length, depth) for length in (350, 400) for depth in (0.0, 0.5, 1.0)
        ]
        assert all(cell["trials"] == 2 and cell["hits"] + len(cell["answers"]) == 2 for cell in document["cells"])
        assert document["accuracy"] == 0 and document["by_length"] == {"350": 0.0, "400": 0.0}
        assert document["seed"] == 0 and document["digits"] == 5
        page = (tmp_path / "map.html").read_text()
        assert page.count("0/2") == 6 and "350" in page
    table = cli("eval", student, *options[:-1])
    assert table.code == 0 and "0/2" in table.out and "100%" in table.out and "0% of the keys" in table.out


def test_what_a_student_writes(cli: Run, folder: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 8)
    options = ("--text", tmp_path / "text.txt", "--prompts", 3, "--prompt-tokens", 20, "--new-tokens", 12)
    itself = cli("eval", student, *options, "--against", student, "--json").json
    assert itself["agreement"] == itself["same_whole"] == 1 and itself["same_tokens"] == 12 and itself["prompts"] == 3
    assert itself["nll"]["teacher"] == itself["nll"]["student"] and set(itself["distinct"]) == {"teacher", "student"}
    other = cli("eval", student, *options, "--against", folder, "--json").json
    assert other["agreement"] < 1 and other["nll"]["student"] > other["nll"]["teacher"]
    assert "12.0 of 12 (100% without one)" in cli("eval", student, *options, "--against", student).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--passkey", "--text", "t.txt"], "--passkey is an evaluation of its own"),
        (["--passkey", "--context", "64"], "--context goes with --text without --against"),
        (["--passkey", "--new-tokens", "9"], "--new-tokens goes with --against"),
        (["--passkey", "--shard", "sp"], "--shard goes with --text"),
        (["--text", "t.txt", "--lengths", "1K"], "--lengths goes with --passkey"),
        (["--text", "t.txt", "--plot", "a.html"], "--plot goes with --passkey"),
        (["--text", "t.txt", "--against", "d", "--tokens", "9"], "--tokens goes with --text without --against"),
        (["--against", "d"], "Missing option '--text'"),
        (["--passkey", "--trials", "0"], "isn't a positive whole number"),
        (["--passkey", "--depths", "0"], "at least one"),
        (["--passkey", "--depths", "5,101"], "neither a number of depths"),
        (["--passkey", "--depths", "middle"], "neither a number of depths"),
        (["--passkey", "--lengths", "1K,,2K"], "isn't a positive whole number"),
        (["--passkey", "--lengths", "4T"], "isn't a positive whole number"),
    ],
)
def test_options_that_make_no_sense(cli: Run, options: list[str], message: str) -> None:
    result = cli("eval", "m", *options)
    assert result.code == 2 and message in result.error and result.out == ""


def test_what_cannot_be_asked_is_refused_before_it_runs(cli: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    np.save(tmp_path / "ids.npy", np.arange(40))
    cases = [
        (["--lengths", "350", "--haystack", tmp_path / "empty.txt"], "empty.txt is empty"),
        (["--lengths", "350", "--haystack", tmp_path / "none.txt"], "none.txt doesn't exist"),
        (["--lengths", "350", "--haystack", tmp_path / "ids.npy"], "--haystack needs text"),
        (["--lengths", "20,400"], "a prompt of 20 tokens has no room: introduction, key and question take"),
        (["--lengths", "350,1G"], "exceed the 512 positions"),
        (["--lengths", "510"], "7 more for the answer exceed the 512 positions of"),
        (["--plot", "map.gif"], "the ending says the format"),
        (["--plot", "nowhere/map.html"], "the folder nowhere doesn't exist"),
    ]
    for options, message in cases:
        result = cli("eval", folder, "--passkey", *options)
        assert result.code == 1 and message in result.error and result.out == "", (options, result.err)


def test_a_picture_needs_matplotlib_before_it_runs(
    cli: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    result = cli("eval", folder, "--passkey", "--plot", tmp_path / "map.png")
    assert result.code == 1 and "needs matplotlib: pip install 'lincompile[report]'" in result.error


def test_models_that_cannot_retrieve(cli: Run, artefact: Path) -> None:
    """No tokenizer; and attention that isn't causal."""
    result = cli("eval", artefact, "--passkey", "--lengths", "100")
    assert result.code == 1 and "has no tokenizer, and passkey retrieval needs text" in result.error
    result = cli("eval", "small_model:backwards", "--passkey", "--lengths", "100")
    assert result.code == 1 and "can't be read token by token: no step form" in result.error


def test_a_model_that_reads_ahead_has_no_perplexity(cli: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100) % 50)
    result = cli("eval", "small_model:backwards", "--text", tmp_path / "ids.npy", "--context", "32")
    assert result.code == 1 and "the model isn't causal" in result.error and result.out == ""


def test_whole_sequence_artefacts_are_named(cli: Run, folder: Path, student: Path, tmp_path: Path) -> None:
    """An artefact without a step form (here: its states taken away) can't be asked."""
    from lincompile.lowering.evaluation.passkey import Passkey, retrieve
    from lincompile.lowering.evaluation.subject import open_subject
    from lincompile.passes.errors import LincompileError

    subject = open_subject(str(student))
    subject.session.program.states.clear()  # type: ignore[attr-defined]
    with pytest.raises(LincompileError, match="runs whole sequences, without states"):
        retrieve(subject, "hay", Passkey((400,)))


def test_extrapolation(cli: Run, folder: Path, student: Path, artefact: Path) -> None:
    """Rotary positions go on beyond the configuration when asked to; a table of positions ends."""
    for model in (folder, student):
        result = cli("eval", model, "--passkey", "--extrapolate", "--lengths", "600", "--depths", 1, "--trials", 1)
        assert result.code == 0 and "0/1" in result.out, result.err
    from lincompile.lowering.evaluation.subject import open_subject
    from lincompile.passes.errors import LincompileError

    with pytest.raises(LincompileError, match=r"looks its positions up in a table .*, which ends at 128"):
        open_subject(str(artefact)).beyond_configuration()


def test_documents_are_read_as_for_training(cli: Run, folder: Path, student: Path, tmp_path: Path) -> None:
    """Rows are texts, not JSON to predict; a mark before UTF-8 is no text."""
    words = "one two three four five six seven eight nine ten " * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": words, "id": index}) + "\n" for index in range(3)))
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + "\n\n".join([words] * 3).encode())
    for model in (folder, student):
        rows, text = (
            cli("eval", model, "--text", tmp_path / name, "--context", 64, "--json").json
            for name in ("rows.jsonl", "text.txt")
        )
        assert rows == text and rows["tokens"] == 3 * len(words) + 4 - 10  # the first of ten windows' aren't predicted


def test_no_token_is_put_before_a_text(cli: Run, folder: Path, student: Path, tmp_path: Path) -> None:
    """Whatever the tokenizer would put there."""
    import lincompile

    beginning = shutil.copytree(folder, tmp_path / "beginning")
    codec = Tokenizer.from_file(str(folder / "tokenizer.json"))
    codec.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", tiny_llama.END)])
    codec.save(str(beginning / "tokenizer.json"))
    its_student = lincompile.compile(beginning, attn="lawcat").save(tmp_path / "student")
    (tmp_path / "text.txt").write_text("one two three four five")
    options = ("--text", tmp_path / "text.txt", "--context", 64, "--json")
    for plain, other in ((folder, beginning), (student, its_student)):
        assert cli("eval", plain, *options).json == cli("eval", other, *options).json


def test_ids_that_the_model_does_not_know(cli: Run, folder: Path, tmp_path: Path) -> None:
    for wrong in (-5, 5000):
        np.save(tmp_path / "ids.npy", np.array([1, 2, wrong, 4]))
        result = cli("eval", folder, "--text", tmp_path / "ids.npy", "--context", 16)
        assert result.code == 1 and f"holds token {wrong}, the model knows 0 to 256" in result.error, result.err


def test_other_tokenizers_are_not_compared(cli: Run, folder: Path, student: Path, tmp_path: Path) -> None:
    """As many tokens, but others: the teacher's would be gibberish to the student, and figures come out even so."""
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    codec = json.loads(file.read_text())
    vocabulary = codec["model"]["vocab"]
    codec["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    file.write_text(json.dumps(codec))
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 8)
    options = ("--text", tmp_path / "text.txt", "--prompts", 2, "--prompt-tokens", 8, "--new-tokens", 4)
    result = cli("eval", student, *options, "--against", tmp_path / "other")
    assert result.code == 1 and "read other tokens in the same text" in result.error, result.err


def test_perplexity_is_as_it_was(cli: Run, student: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 8)
    document = cli("eval", student, "--text", tmp_path / "text.txt", "--context", 64, "--tokens", 100, "--json")
    assert set(json.loads(document.out)) == {"perplexity", "nll", "tokens"} and document.json["tokens"] == 100
