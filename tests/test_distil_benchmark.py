"""``benchmarks/distil.py``: a row from scratch, cut off and taken up again, its control, and the table of both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from safetensors import safe_open

from lincompile.passes.errors import LincompileError
from lincompile.passes.split_heads import heads_text

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = "--device cpu --context 64 --limit 130 --mode lora:2 --transfer-steps 3 --transfer-length 32 --transfer-batch 2"
SMALL += " --logits-length 32 --logits-batch 2 --task-limit 2"
TASK_ROWS = {
    "arc_easy_validation": {"question": "q", "choices": {"text": ["a", "bc"], "label": ["A", "B"]}, "answerKey": "B"},
    "piqa_validation": {"goal": "g", "sol1": "one", "sol2": "two", "label": 1},
    "boolq_validation": {"passage": "p", "question": "is it", "answer": True},
    "lambada_first_half": {"text": "one two three"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama.save(tmp_path_factory.mktemp("distil") / "model")
    (folder.parent / "train.txt").write_text("the cat sat on the mat and the dog lay by the door. " * 40)
    (folder.parent / "held.txt").write_text("a dog sat by the mat and a cat lay on the floor. " * 6)
    for name, row in TASK_ROWS.items():
        (folder.parent / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    return folder


@pytest.fixture
def distil(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the script in this process; returns the results it wrote."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(model.parent)
    import distil as script

    def run(variant: str, *more: str) -> dict[str, Any]:
        command = ["distil.py", "model", "--variant", variant, "--train", "train.txt", "--eval", "held=held.txt"]
        monkeypatch.setattr(sys, "argv", [*command, "--out", "out", *SMALL.split(), *more])
        script.main()
        return json.loads((model.parent / "out" / f"{variant}.json").read_text())  # type: ignore[no-any-return]

    return run


def test_texts_follow_one_another_as_documents_of_their_own(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distil as script

    one, two = tmp_path / "one.jsonl", tmp_path / "two.txt"
    one.write_text('{"text": "the cat"}\n{"text": ""}\n{"text": "a dog"}\n')
    two.write_text("by the door")
    loaded = script.load_model(str(model))
    first, both = script.corpus_of([str(one)], loaded), script.corpus_of([str(one), str(two)], loaded)
    assert both.documents.tolist() == [*first.documents.tolist(), len(first.ids)]
    assert both.ids[: len(first.ids)].equal(first.ids) and both.empty == 1
    assert both.ids[len(first.ids) :].equal(script.read_corpus(str(two), loaded.tokenizer).ids)
    assert len(script.corpus_of([], loaded).ids) == 0


@pytest.mark.slow
def test_a_row_is_made_cut_off_taken_up_and_measured(
    distil: Callable[..., dict[str, Any]],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import distil as script

    variant, out = "lawcat-window64-softmax6", model.parent / "out"
    options = ["--keep-softmax", "auto:1", "--logits-steps", "3", "--tasks", "."]

    def cut_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    plain, choose = script.distil_logits, script.choose
    monkeypatch.setattr(script, "distil_logits", cut_off)
    with pytest.raises(KeyboardInterrupt):
        distil(variant, *options)
    found = json.loads((out / f"{variant}.json").read_text())
    assert {"teacher", "transfer", "after_transfer", "choice"} <= set(found) and "logits" not in found
    assert (out / f"{variant}.transfer.safetensors").is_file()

    monkeypatch.setattr(script, "distil_logits", plain)
    monkeypatch.setattr(script, "choose", cut_off)  # what was found is read back
    done = distil(variant, *options)
    assert done["transfer"]["resumed_at"] == 3 and done["choice"] == found["choice"]
    assert done["logits"]["steps"] == 3 and done["logits"]["losses"] and done["seconds"] > 0
    assert done["options"]["recipe"]["logits"]["length"] == 32 and done["options"]["seed"] == 0
    assert {"window only", "linear only", "no attention"} == set(done["ablations"])
    assert done["generation"]["held"]["prompts"] == 16 and {"before", "after"} <= set(done["int6"])
    assert done["student"]["held"]["tokens"] == done["int6"]["before"]["held"]["tokens"] == 127
    before, after = (done["int6"][when]["held"]["perplexity"] for when in ("before", "after"))
    assert done["int6"]["layers"] >= 14 and before == pytest.approx(done["student"]["held"]["perplexity"], rel=1e-3)
    assert before != after, "what is measured before isn't the program that was quantized in place"
    assert done["zero-shot"]["teacher"]["tasks"]["piqa"]["documents"] == 2 and "partial" not in done["zero-shot"]
    assert "torch" in done["versions"] and done["transfer"]["peak_memory_bytes"] > 1e8
    with safe_open(out / f"{variant}.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    assert record["stages"] == ["attention transfer", "layer choice", "logits"] and record["seconds"] > 0
    assert record["tokens"] == done["transfer"]["tokens"] + done["logits"]["tokens"]
    student = done["student"]["held"]["perplexity"]
    assert record["perplexity"]["held"]["student"] == pytest.approx(student, abs=1e-3)

    # A last stage that has gone on since (cut short by --until, for example) makes what was measured before it old.
    older = done | {"student": "old", "ablations": "old", "logits": done["logits"] | {"steps": 1}}
    (out / f"{variant}.json").write_text(json.dumps(older))
    again = distil(variant, *options)
    assert again["logits"]["steps"] == again["logits"]["resumed_at"] == 3
    assert again["student"] == done["student"] and again["ablations"] == done["ablations"]

    control = distil("control", "--measures", "", "--logits-steps", "40")
    assert control["student"]["held"]["perplexity"] < 0.9 * control["teacher"]["held"]["perplexity"]
    assert control["logits"]["after"] < control["logits"]["before"]
    assert control["teacher"] == done["teacher"], "training the control leaves the teacher as it was"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["distil.py", "--table", str(out)])
    script.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and "held ÷ control" in table[0] and "held, int6" in table[0]

    # An adapter is measured again without training; six bits are calibrated on text, which has to be given.
    again = f"distil.py model --variant {variant} --evaluate out/{variant}.safetensors --eval held=held.txt"
    for text, measured in (("", False), (" --train train.txt", True)):
        command = (
            f"{again}{text} --out again{text[-9:]} --measures int6 --keep-softmax {done['choice']['kept'][0]}, {SMALL}"
        )
        monkeypatch.setattr(sys, "argv", command.split())
        script.main()
        assert ("int6 is left out: give --train TEXT" in capsys.readouterr().out) is not measured
        found = json.loads(Path(f"again{text[-9:]}", f"{variant}.json").read_text())
        assert ("int6" in found) is measured and found["student"] == done["student"]

    # A row may begin from another's transfer, and still chooses its layers.
    monkeypatch.setattr(script, "choose", choose)
    (out / f"{variant}.logits.ckpt").unlink()  # of the student that its own transfer had trained
    started = distil(variant, *options, "--measures", "", "--start", f"out/{variant}.transfer.safetensors")
    assert (
        started["choice"]["kept"] == done["choice"]["kept"]
        and "transfer" not in started
        and started["logits"]["steps"] == 3
    )
    assert f"--measures '' --start out/{variant}.transfer.safetensors" in started["command"]


def test_whole_weights_say_of_which_sites_they_are(distil: Callable[..., dict[str, Any]]) -> None:
    """The floor of gates above all, which no weight shows; without a word they are of gates without one."""
    from safetensors.torch import load_file, save_file

    options = ["--mode", "full", "--measures", "", "--transfer-steps", "1", "--logits-steps", "1"]
    distil("lawcat-full", *options)
    path = "out/lawcat-full.safetensors"
    with pytest.raises(LincompileError, match="a student that another adapter or earlier stage had trained"):
        distil("lawcat-full", *options, "--start", path)
    Path("out/lawcat-full.logits.ckpt").unlink()
    assert distil("lawcat-full", *options, "--start", path)["logits"]["steps"] == 1
    save_file(load_file(path), "old.safetensors")
    with pytest.raises(SystemExit, match="another floor of gates"):
        distil("lawcat-full", *options, "--start", "old.safetensors")


def test_weights_of_tokens_are_for_logits_alone(
    distil: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Given to what has no use for them they are refused, not passed over."""
    for name in ("stretch", "emphasis", "cross-entropy"):
        with pytest.raises(SystemExit):
            distil("lawcat-full", f"--transfer-{name}", "0.5")
        assert f"unrecognized arguments: --transfer-{name}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the control learns the text itself, every token alike: leave its cross_ent"):
        distil("control", "--logits-cross-entropy", "0.5", "--logits-steps", "1")


def test_heads_are_chosen_and_the_adapter_names_them(distil: Callable[..., dict[str, Any]], model: Path) -> None:
    from lincompile.passes.distil.adapter import _opened

    done = distil("lawcat-window64-heads2", "--measures", "", "--logits-steps", "1")
    assert done["options"]["recipe"]["keep"] == "heads:2" and len(done["heads"]["chosen"]) == 2
    assert done["heads"]["tokens_apart"] == 256
    with _opened(model.parent / "out" / "lawcat-window64-heads2.safetensors") as (_, header):
        sites = header.sites
    kept = heads_text(list(sites), [method == "softmax" for method in sites.values()])
    assert kept == ",".join(sorted(done["heads"]["chosen"]))


def test_passkey_rows_are_kept_cell_by_cell(
    distil: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is asked beyond its configuration's positions, the teacher as far as they reach."""
    small = ["--logits-steps", "1", "--passkey", "400,600"]
    small += [
        "--extension-steps",
        "2",
        "--extension-length",
        "64",
        "--extension-batch",
        "2",
        "--extension-stretch",
        "16",
    ]
    done = distil("lawcat-passkey", *small, "--measures", "passkey")
    extension = done["options"]["recipe"]["extension"]
    assert done["extension"]["steps"] == 2 and (extension["retrieval"], extension["stretch"]) == (0.7, 16)
    assert list(done["passkey"]["student"]["by_length"]) == ["400", "600"]
    assert list(done["passkey"]["student, repeated"]["by_length"]) == ["400", "600"]
    assert list(done["passkey"]["teacher"]["by_length"]) == ["400"] and "partial" not in done["passkey"]


def test_every_recipe_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from distil_measure import Measures
    from distil_recipes import RECIPES

    from lincompile.passes.distil.logits import lora_rank
    from lincompile.passes.distil.transfer import Transfer
    from lincompile.passes.linearization.methods import METHODS
    from lincompile.passes.linearize import parse_keep

    for recipe in RECIPES.values():
        assert recipe.attn in (*METHODS, "softmax") and lora_rank(recipe.train) >= 0
        assert Transfer(loss=recipe.transfer_loss) and (recipe.keep is None or parse_keep(recipe.keep))
        assert all(hasattr(Measures, name.replace("-", "_")) for name in recipe.measures)
        assert ("passkey" in recipe.measures) == bool(recipe.passkey)
        assert "ablations" not in recipe.measures or recipe.window
        stages = [getattr(recipe, field.name) for field in fields(recipe)]
        assert sum(stage.seconds for stage in stages if hasattr(stage, "retrieval")) <= 600
