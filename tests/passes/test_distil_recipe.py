"""The stages together: length extension, budgets, kills and resumed runs, and text that doesn't fit the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from distil_models import LENGTH, equal, linear, proved, text, windows
from torch import Tensor

from lincompile.passes.distil import recipe as recipes
from lincompile.passes.distil.adapter import apply_adapter, save_adapter
from lincompile.passes.distil.data import TokenWindows
from lincompile.passes.distil.logits import LogitDistillation, LogitReport, distil_logits
from lincompile.passes.distil.recipe import Extension, Listener, Recipe, check_tokens, run_recipe
from lincompile.passes.distil.retrieval import Needles, WithRetrieval
from lincompile.passes.distil.transfer import Errors, Transfer, transfer
from lincompile.passes.errors import LincompileError
from lincompile.passes.program import Program

LOGITS = LogitDistillation(rate=3e-3, lora_rate=1e-2, attention_rate=1e-2)


@pytest.fixture(scope="module")
def teacher() -> Program:
    return proved()


def extended(**options: Any) -> Recipe:
    facts = text(80, seed=9).split(4)  # short enough for windows of these lengths
    extension = Extension(2 * LENGTH, share=0.25, retrieval=0.5, needles=Needles(facts, facts, [2] * len(facts)))
    plain: dict[str, Any] = {
        "train": "lora:2",
        "tokens": 24 * 4 * LENGTH,
        "length": LENGTH,
        "batch": 4,
        "logits": LOGITS,
        "extension": extension,
    }
    return Recipe(**plain | options)


def run(teacher: Program, recipe: Recipe, **options: Any) -> Any:
    return run_recipe(
        teacher, linear(teacher), text(), recipe, relinearize=lambda kept: linear(teacher, keep=kept), **options
    )


def test_echoes_are_heard_in_every_stage(teacher: Program) -> None:
    """Each stage's losses change, and by the same echoes every time."""
    plain, echoing, again = (run(teacher, extended(echoes=share)) for share in (0.0, 0.5, 0.5))
    for stage in ("transfer", "logits", "extension"):
        losses = [getattr(done, stage).losses for done in (plain, echoing, again)]
        assert losses[0] != losses[1] and losses[1] == losses[2], stage
    with pytest.raises(LincompileError, match="--echoes -1: the share of windows"):
        Recipe(echoes=-1)


def test_the_extension_goes_on_where_the_logits_ended(teacher: Program, tmp_path: Path) -> None:
    notes: list[str] = []
    stages: list[str] = []
    done = run(teacher, extended(), listener=Listener(stage=stages.append, note=notes.append))
    assert stages == ["distil logits", "extend length"]
    assert [part.steps for part in (done.transfer, done.logits, done.extension)] == [6, 11, 6]
    assert done.extension.tokens == 6 * 4 * LENGTH, "half as many windows, twice as long"
    assert done.extension.after < done.extension.before
    assert any(note.startswith("extension: 1 documents") and f"of {2 * LENGTH} tokens" in note for note in notes)
    assert done.record()["extension"]["steps"] == 6
    # one pair of low-rank factors explains both stages, so an adapter holds them
    path = tmp_path / "a.safetensors"
    save_adapter(path, teacher, done.student)
    fresh = linear(teacher)
    apply_adapter(path, teacher, fresh)
    tokens = windows().measure(2)
    with torch.no_grad():
        wanted, got, untrained = (program(tokens) for program in (done.student, fresh, linear(teacher)))
    assert (got - wanted).norm() < 0.02 * (untrained - wanted).norm()


def test_low_rank_additions_are_trained_on(teacher: Program, tmp_path: Path) -> None:
    student, path = linear(teacher), tmp_path / "a.safetensors"
    distil_logits(teacher, student, windows(), replace(LOGITS, steps=8, train="lora:2"))
    save_adapter(path, teacher, student)
    wider = linear(teacher)
    apply_adapter(path, teacher, wider)
    before = {name: p.detach().clone() for name, p in wider.graph_module.named_parameters()}
    distil_logits(teacher, wider, windows(), replace(LOGITS, steps=0, train="lora:3"))
    for name, parameter in wider.graph_module.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=1e-5)
    distil_logits(teacher, wider, windows(), replace(LOGITS, steps=2, train="lora:3"))
    save_adapter(path, teacher, wider)
    narrower = linear(teacher)
    apply_adapter(path, teacher, narrower)
    with pytest.raises(LincompileError, match=r"lora:2: the student has additions of rank 3: write lora:3"):
        distil_logits(teacher, narrower, windows(), replace(LOGITS, steps=1, train="lora:2"))


def test_a_failed_stage_leaves_the_student_what_it_had(teacher: Program) -> None:
    student = linear(teacher)
    distil_logits(teacher, student, windows(), replace(LOGITS, steps=3, train="lora:2"))
    before = {name: p.detach().clone() for name, p in student.graph_module.named_parameters()}

    def stop(step: int, *_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil_logits(teacher, student, windows(), replace(LOGITS, steps=3, train="lora:2").scaled(0), progress=stop)
    for name, parameter in student.graph_module.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "none"}, "--extend trains on the teacher's logits: add --train"),
        ({"extension": Extension(LENGTH)}, f"--extend {LENGTH} isn't longer than the windows of {LENGTH} before"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        extended(**options)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.0}, {"retrieval": 2.0}, {"rates": 0.0}])
def test_impossible_extensions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LincompileError, match="the extension needs a share between 0 and 1"):
        Extension(64, **options)
    with pytest.raises(LincompileError, match=r"retrieval examples are made of needles: give Extension\(needles="):
        Extension(64, retrieval=0.1)


def test_windows_that_no_retrieval_example_fits_are_refused() -> None:
    """They would all have stayed text. The shortest that is taken does hold one."""
    made = Needles([torch.arange(40)], [torch.arange(20)], opening=[1, 2])
    with pytest.raises(LincompileError, match="--extend 93: a retrieval example takes 94 tokens or more; give a great"):
        Extension(93, retrieval=0.5, needles=made)
    assert Extension(93, needles=made).retrieval == 0
    length = Extension(94, retrieval=0.5, needles=made).length
    assert WithRetrieval(windows(length=length), made, share=1.0).made(0).asked.any()
    several = replace(made, parts=(2, 4))
    with pytest.raises(LincompileError, match="takes 188 tokens"):
        Extension(187, retrieval=0.5, needles=several)


def test_retrieval_examples_of_another_vocabulary_are_refused_before_training(teacher: Program) -> None:
    """Digits may come in no text that is trained on, and stages that went well may have come before them."""
    strange = Needles([torch.tensor([5, zoo.VOCAB])], [torch.tensor([5])])
    recipe = extended(extension=Extension(2 * LENGTH, retrieval=0.5, needles=strange))
    with pytest.raises(LincompileError, match=f"holds token {zoo.VOCAB}, the model knows 0 to {zoo.VOCAB - 1}"):
        run(teacher, recipe, listener=Listener(stage=lambda text: pytest.fail("a stage was begun")))


def test_an_extension_longer_than_every_document_is_refused(teacher: Program) -> None:
    starts = torch.arange(0, 2400, 40)
    with pytest.raises(LincompileError, match=r"--extend 48: no document of the text is longer than the windows of 24"):
        run(teacher, extended(tokens=3 * 4 * LENGTH), documents=starts)


def test_documents_are_counted_aloud(teacher: Program) -> None:
    notes: list[str] = []
    starts = torch.tensor([0, 1000, 1010, 1700])
    run(teacher, Recipe(tokens=LENGTH, length=LENGTH), documents=starts, listener=Listener(note=notes.append))
    assert notes == [
        "4 documents in windows of their own: 101 of 24 tokens; 1 shorter documents (10 tokens) are left out"
    ]


@pytest.mark.parametrize(("ids", "wrong"), [(text() + 60, None), (text() * 1000, None), (text() - 50, "-")])
def test_tokens_the_model_does_not_know_are_refused(teacher: Program, ids: Tensor, wrong: str | None) -> None:
    with pytest.raises(
        LincompileError, match=rf"holds token {wrong or ''}\d+, the model knows 0 to \d+: another model's"
    ):
        run_recipe(
            teacher, linear(teacher), ids, Recipe(tokens=LENGTH, length=LENGTH), relinearize=lambda kept: teacher
        )


def test_a_table_of_positions_is_none_of_tokens(request: pytest.FixtureRequest) -> None:
    program = request.getfixturevalue("proved")("gpt2").program
    assert program.input_with_role("positions") is not None and zoo.BLOCK < zoo.VOCAB
    check_tokens(program, torch.tensor([0, zoo.VOCAB - 1]))
    with pytest.raises(LincompileError, match=f"holds token {zoo.VOCAB}, the model knows 0 to {zoo.VOCAB - 1}"):
        check_tokens(program, torch.tensor([zoo.VOCAB]))


def test_stages_do_not_go_on_from_another_transfer(teacher: Program, tmp_path: Path) -> None:
    """Whose checkpoint was removed, as the refusal of the first stage's asks; theirs would undo the new transfer."""
    recipe = extended(extension=None)
    run(teacher, recipe, checkpoint=tmp_path / "c")
    (tmp_path / "c").unlink()
    again = run(teacher, recipe, checkpoint=tmp_path / "c")
    assert again.logits.resumed_at == again.logits.steps, "the same transfer over again"
    (tmp_path / "c").unlink()
    with pytest.raises(LincompileError, match=r"c\.logits belongs to a run .* another adapter or earlier stage had"):
        run(teacher, replace(recipe, transfer=Transfer(loss="both")), checkpoint=tmp_path / "c")


# ---- budgets


def test_a_time_budget_is_shared_by_three_stages_and_goes_on_where_it_was(
    teacher: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float | None] = []

    def fake(*args: Any, checkpoint: Path | None, **options: Any) -> LogitReport:
        given.append(args[3].seconds)
        return LogitReport(seconds=args[3].seconds)

    moved = transfer(teacher, linear(teacher), windows(), Transfer(steps=1))
    moved.seconds = 40.0  # as a resumed run reports what it took in another process
    monkeypatch.setattr(recipes, "transfer", lambda *args, **options: moved)
    monkeypatch.setattr(recipes, "distil_logits", fake)
    run(teacher, extended(tokens=None, seconds=100.0), checkpoint=tmp_path / "c")
    first, second = given
    assert first == pytest.approx(60 * 0.4875 / 0.7375, rel=0.01) and second == pytest.approx(60 - first, rel=0.01)


def test_a_run_on_time_can_be_resumed(teacher: Program, tmp_path: Path) -> None:
    """What is left for the logits differs by milliseconds from run to run: such a checkpoint must not be refused."""
    recipe = extended(tokens=None, seconds=2.0, extension=None)
    first = run(teacher, recipe, checkpoint=tmp_path / "c")
    again = run(teacher, recipe, checkpoint=tmp_path / "c")
    assert again.logits.resumed_at == first.logits.steps


def test_a_stage_without_time_left_takes_no_step(teacher: Program) -> None:
    student = linear(teacher)
    report = transfer(teacher, student, windows(), Transfer(steps=5, seconds=0.0))
    assert report.steps == 0 and report.before == report.after


# ---- kill -9

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[1] + "/passes")
from lincompile.passes.distil import loop
from test_distil_recipe import extended, proved, run
from dataclasses import replace
from lincompile.passes.distil.transfer import Transfer
from lincompile.passes.distil.recipe import Listener
torch.manual_seed(0)
teacher = proved()
recipe = extended(transfer=Transfer(save_every=2))
recipe = replace(recipe, logits=replace(recipe.logits, save_every=2))

def attempt(kill_stage, kill_step):
    stage = ["transfer"]
    def advance(done, total, text):
        if stage[0] == kill_stage and done == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
    return run(teacher, recipe, checkpoint=Path(sys.argv[2]),
               listener=Listener(stage=lambda text: stage.__setitem__(0, text), advance=advance))

for kill in (("transfer", 5), ("distil logits", 8), ("extend length", 3)):
    child = os.fork()
    if child == 0:
        attempt(*kill)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kill, status)
done = attempt("", 0)
torch.save({"losses": [r.losses for r in (done.transfer, done.logits, done.extension)],
            "resumed": [r.resumed_at for r in (done.transfer, done.logits, done.extension)],
            "weights": dict(done.student.graph_module.state_dict())}, sys.argv[3])
"""


@pytest.mark.timeout(900)  # four processes' work, beside other tests
def test_runs_killed_in_every_stage_end_as_the_run_that_was_not(teacher: Program, tmp_path: Path) -> None:
    recipe = extended(transfer=Transfer(save_every=2), logits=replace(LOGITS, save_every=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run(teacher, recipe)
    finally:
        torch.set_num_threads(threads)
    folder, found = str(Path(__file__).parents[1]), tmp_path / "found.pt"
    command = [sys.executable, "-c", KILLED, folder, str(tmp_path / "c"), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = torch.load(found)
    assert result["resumed"] == [6, 11, 2], "the first two stages were finished, the last resumed from its checkpoint"
    assert result["losses"] == [part.losses for part in (whole.transfer, whole.logits, whole.extension)]
    assert equal(result["weights"], dict(whole.student.graph_module.state_dict()))


# ---- memory


def test_the_transfer_takes_smaller_pieces_when_memory_runs_out(
    teacher: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Errors.learn
    asked: list[int] = []

    def tight(self: Errors, tokens: Tensor, share: float, compiled: bool) -> Tensor:
        asked.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError
        return learn(self, tokens, share, compiled)

    whole, pieces, notes = linear(teacher), linear(teacher), []
    expected = transfer(teacher, whole, windows(), Transfer(steps=3))
    monkeypatch.setattr(Errors, "learn", tight)
    file = tmp_path / "c"
    report = transfer(teacher, pieces, windows(), Transfer(steps=3), checkpoint=file, note=notes.append)
    assert notes == report.notes == [f"out of memory at step 0: now 2 windows of {LENGTH} tokens at a time"]
    assert asked == [4, 2, 2, 2, 2, 2, 2] and report.piece_tokens == 2 * LENGTH
    assert report.losses == pytest.approx(expected.losses, rel=0.05), "the mean of the pieces' relative errors"
    resumed = transfer(teacher, linear(teacher), windows(), Transfer(steps=3), checkpoint=file)
    assert (resumed.piece_tokens, resumed.notes) == (report.piece_tokens, report.notes)


def test_one_window_that_does_not_fit_is_an_error(teacher: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Errors, "learn", full)
    with pytest.raises(LincompileError, match=f"one window of {LENGTH} tokens doesn't fit into the GPU's memory"):
        transfer(teacher, linear(teacher), windows(), Transfer(steps=1), note=lambda text: None)


def test_windows_of_several_sizes_train_in_one_run(teacher: Program) -> None:
    starts = torch.cat([torch.arange(0, 1200, 20), torch.arange(1200, 2400, 100)])
    data = TokenWindows(text(), 32, 2, documents=starts)
    assert [w.size for w in data.sizes] == [32, 16]
    report = transfer(teacher, linear(teacher), data, Transfer(steps=12, rate=3e-2))
    assert report.tokens == 12 * 64
    learnt = distil_logits(teacher, linear(teacher), data, replace(LOGITS, steps=12))
    assert learnt.after < learnt.before and json.dumps(data.fingerprint())
