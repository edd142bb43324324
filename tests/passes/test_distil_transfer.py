"""Attention transfer: errors fall, runs repeat and resume to the bit, and what goes wrong is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from distil_models import LENGTH, equal, linear, proved, text, trained, windows
from torch import Tensor, nn

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.distil.instrument import instead
from lincompile.passes.distil.loop import LoopOptions, Masters, Part, schedule, train
from lincompile.passes.distil.transfer import Transfer, TransferReport, transfer
from lincompile.passes.errors import LincompileError
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program


@pytest.fixture(scope="module")
def teacher() -> Program:
    return proved()


@pytest.mark.parametrize("attn", ["gla", "hedgehog", "lawcat", "gated-delta"])
def test_the_error_of_every_site_falls(teacher: Program, attn: str) -> None:
    student = linear(teacher, attn)
    own = {name: p.detach().clone() for name, p in teacher.graph_module.named_parameters()}
    report = transfer(teacher, student, windows(), Transfer(steps=30, rate=3e-2))
    assert list(report.before) == [site.path for site in teacher.sites]
    assert all(report.after[path] < 0.97 * report.before[path] for path in report.before), (report.before, report.after)
    assert (report.steps, report.tokens, len(report.losses)) == (30, 30 * 4 * LENGTH, 30)
    assert equal(own, dict(teacher.graph_module.named_parameters())), "the teacher must not change"
    assert not any(p.grad is not None for p in student.graph_module.parameters())


def test_reported_errors_are_those_of_the_student_as_it_runs(teacher: Program) -> None:
    """The first site sees the teacher's inputs in the student too, so its output there gives the same error."""
    student = linear(teacher)
    data = windows()
    report = transfer(teacher, student, data, Transfer(steps=0))
    held_out = data.measure(4)

    def attention_output(program: Program) -> Tensor:
        twin = program.clone()
        node = twin.sites[0].node
        assert node is not None
        if twin.sites[0].method != "softmax":
            node = next(user for user in node.users if user.args[1] == 0)
        output = next(n for n in twin.graph_module.graph.nodes if n.op == "output")
        output.args = ((node,),)
        twin.graph_module.recompile()
        with torch.no_grad():
            return twin.graph_module(held_out)[0]  # type: ignore[no-any-return]

    got, wanted = attention_output(student), attention_output(teacher)
    each = (got - wanted).square().sum((1, 2, 3)) / wanted.square().sum((1, 2, 3))
    assert report.before == report.after
    assert report.before[teacher.sites[0].path] == pytest.approx(float(each.mean()), rel=1e-4)


def test_kept_sites_are_left_alone(teacher: Program) -> None:
    student = linear(teacher, keep=(1,))
    report = transfer(teacher, student, windows(), Transfer(steps=2))
    assert list(report.before) == [teacher.sites[0].path]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [4, 7])
def test_an_interrupted_run_resumes_to_the_bit(teacher: Program, tmp_path: Path, stop: int) -> None:
    options = Transfer(steps=10, save_every=2)
    whole, parted = linear(teacher), linear(teacher)
    expected = transfer(teacher, whole, windows(), options)

    def interrupt(step: int, *_: object) -> None:
        if step == stop:
            raise Interrupted

    file = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        transfer(teacher, parted, windows(), options, checkpoint=file, progress=interrupt)
    fresh = linear(teacher)
    resumed = transfer(teacher, fresh, windows(), options, checkpoint=file)
    assert resumed.resumed_at == (stop - 1) // 2 * 2, "the last whole checkpoint before the interruption"
    assert resumed.losses == expected.losses
    assert (resumed.before, resumed.after) == (expected.before, expected.after)
    assert equal(trained(whole), trained(fresh))
    assert not list(tmp_path.glob("*.partial"))
    again = linear(teacher)
    finished = transfer(teacher, again, windows(), options, checkpoint=file)
    assert finished.resumed_at == 10 and equal(trained(again), trained(whole)), "a finished run isn't trained again"


def test_runs_repeat_by_seed(teacher: Program) -> None:
    runs = []
    for seed in (0, 0, 1):
        student = linear(teacher)
        runs.append((transfer(teacher, student, windows(seed=seed), Transfer(steps=4)).losses, trained(student)))
    assert runs[0][0] == runs[1][0] and equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_a_checkpoint_of_another_run_is_refused(teacher: Program, tmp_path: Path) -> None:
    file = tmp_path / "run.ckpt"
    transfer(teacher, linear(teacher), windows(), Transfer(steps=2), checkpoint=file)
    other = copy.deepcopy(teacher.graph_module.state_dict())
    for data, options in ((windows(), Transfer(steps=3)), (windows(ids=text(seed=6)), Transfer(steps=2))):
        with pytest.raises(LincompileError, match=r"run\.ckpt belongs to a run with other options, data or another"):
            transfer(teacher, linear(teacher), data, options, checkpoint=file)
    with pytest.raises(LincompileError, match="belongs to a run with other"):
        transfer(teacher, linear(teacher, keep=(0,)), windows(), Transfer(steps=2), checkpoint=file)
    for one, two in (({"window": 4}, {"window": 2}), ({"keep": (0,)}, {"keep": (1,)})):  # parameters of the same shapes
        part = tmp_path / f"{next(iter(one))}.ckpt"
        transfer(teacher, linear(teacher, **one), windows(), Transfer(steps=2), checkpoint=part)
        with pytest.raises(LincompileError, match="belongs to a run with other"):
            transfer(teacher, linear(teacher, **two), windows(), Transfer(steps=2), checkpoint=part)
    another = proved()
    with torch.no_grad():
        next(another.graph_module.parameters()).add_(1e-3)
    with pytest.raises(LincompileError, match="another model"):
        transfer(another, linear(another), windows(), Transfer(steps=2), checkpoint=file)
    assert all(torch.equal(value, teacher.graph_module.state_dict()[name]) for name, value in other.items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 truncated", None])
def test_a_damaged_checkpoint_is_refused(teacher: Program, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "run.ckpt"
    if content is None:
        torch.save({"some": "other file"}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(LincompileError, match=r"run\.ckpt is damaged or isn't one: remove it or name another"):
        transfer(teacher, linear(teacher), windows(), Transfer(steps=1), checkpoint=file)


def test_a_checkpoint_with_other_numbers_or_none_is_refused(teacher: Program, tmp_path: Path) -> None:
    """torch reads bits that have changed without a word."""
    file, options = tmp_path / "run.ckpt", Transfer(steps=1)
    transfer(teacher, linear(teacher), windows(), options, checkpoint=file)
    whole = torch.load(file)
    for part in ("masters", "optimizer", "report"):
        torch.save({name: value for name, value in whole.items() if name != part}, file)
        with pytest.raises(LincompileError, match=r"run\.ckpt is damaged or isn't one: remove it or name another"):
            transfer(teacher, linear(teacher), windows(), options, checkpoint=file)
    torch.save(whole, file)
    written = bytearray(file.read_bytes())
    place = written.index(next(iter(whole["masters"].values())).numpy().tobytes())
    written[place] ^= 0x41
    file.write_bytes(written)
    with pytest.raises(LincompileError, match=r"run\.ckpt is damaged or isn't one: remove it or name another"):
        transfer(teacher, linear(teacher), windows(), options, checkpoint=file)


def test_divergence_stops_names_the_site_and_keeps_the_checkpoint(teacher: Program, tmp_path: Path) -> None:
    student, file = linear(teacher), tmp_path / "run.ckpt"
    options = Transfer(steps=40, rate=1e38, gate_rate=1e38, bias_rate=1e38, save_every=1)
    with pytest.raises(LincompileError, match=r"diverged at step \d+: the (loss|gradient) at 'h\.[01]\.attn'"):
        transfer(teacher, student, windows(), options, checkpoint=file)
    assert torch.load(file, weights_only=True)["report"]["steps"] >= 1


def test_nan_weights_are_named_before_training() -> None:
    broken = proved()
    student = linear(broken)
    with torch.no_grad():
        dict(broken.graph_module.named_parameters())["h.1.attn.c_attn.weight"][-1, 0] = float("nan")
    with pytest.raises(LincompileError, match=r"h\.1\.attn' isn't finite before any training"):
        transfer(broken, student, windows(), Transfer(steps=1))


def test_a_time_budget_ends_the_run(teacher: Program) -> None:
    report = transfer(teacher, linear(teacher), windows(), Transfer(steps=1_000_000, seconds=1.0))
    assert 1 <= report.steps < 1_000_000
    assert 0.9 <= report.seconds < 20


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"clip": 0.0}, {"warmup": 2.0}, {"save_every": 0}, {"seconds": -1.0}])
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LincompileError, match="training"):
        Transfer(**wrong)


def test_the_student_inside_the_teacher_is_the_student() -> None:
    """On a model that takes masks and positions and has rotary embeddings, and grouped heads (9 over 3)."""
    model, example = zoo.build("llama-gqa")
    llama = Pipeline([Canonicalize(), ProveAttention()])(capture(model, example))
    for attn, keep in (("lawcat", ()), ("hedgehog", (0,))):
        student = linear(llama, attn, keep=keep)
        tokens = windows().step(0)
        positions = torch.arange(LENGTH).expand(4, LENGTH)
        values = {"tokens": tokens, "mask": torch.ones_like(tokens), "positions": positions}
        inputs = {i.name: values[i.role].to(student.example[i.name].dtype) for i in student.inputs}
        with torch.no_grad():
            (got,) = instead(llama, student)(tokens)
            torch.testing.assert_close(got, student(**inputs), atol=1e-5, rtol=1e-5)


# ---- data


def test_batches_cover_an_epoch_once_and_never_the_held_out_windows() -> None:
    data = windows(ids=torch.arange(24 * 41), batch=3)
    assert data.training == 39 and data.measure(9).shape == (2, LENGTH)
    epoch = torch.cat([data.step(i) for i in range(13)])
    assert sorted(epoch[:, 0].tolist()) == [i * 24 for i in range(39)]
    assert not torch.equal(data.step(0), data.step(13)), "shuffled anew each epoch"
    assert torch.equal(data.step(20), windows(ids=torch.arange(24 * 41), batch=3).step(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": torch.arange(40)}, "40 tokens, less than two windows of 24: give more text"),
        ({"length": 1}, "windows of 1 tokens"),
        ({"batch": 0}, "0 at a time"),
    ],
)
def test_text_that_is_too_short_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        windows(**options)


# ---- the loop itself


def test_bfloat16_parameters_keep_float32_masters() -> None:
    """A hundred steps of 1e-4 move a bfloat16 parameter by 1e-2, although each is below its resolution."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def losses_of(step: int) -> tuple[Tensor, int]:
        loss = parameter.float().sum()
        loss.backward()
        return loss.detach()[None], 1

    options = LoopOptions(steps=100, warmup=0.0)
    train([Part("p", {"w": parameter}, {"w": 1e-3})], losses_of, options)
    expected = 1 - 1e-3 * sum(schedule(step / 100, 0.0) for step in range(100))
    assert parameter.dtype == torch.bfloat16 and expected < 0.96
    assert torch.allclose(parameter.float(), torch.tensor(expected), atol=2**-8)


def overflowing(steps: int, checkpoint: Path | None = None) -> nn.Parameter:
    """Trains a parameter that its second step takes beyond float32's largest number."""
    parameter = nn.Parameter(torch.full((3,), -3.2e38))

    def losses_of(step: int) -> tuple[Tensor, int]:
        parameter.grad = torch.ones(3)
        return torch.zeros(1), 1

    options = LoopOptions(steps=steps, warmup=0.0, save_every=1)
    train([Part("p", {"w": parameter}, {"w": 1.5e37})], losses_of, options, checkpoint=checkpoint)
    return parameter


def test_a_last_update_that_is_not_finite_is_noticed(tmp_path: Path) -> None:
    assert overflowing(1).isfinite().all()
    file = tmp_path / "run.ckpt"
    for checkpoint in (None, file):
        with pytest.raises(LincompileError, match=r"diverged at step 1: the update at 'p' isn't finite, first in 'w'"):
            overflowing(2, checkpoint)
    assert torch.load(file, weights_only=True)["report"]["steps"] == 1


def test_errors_that_are_not_finite_after_the_last_step_are_named(teacher: Program) -> None:
    options = Transfer(steps=1, rate=1e38, gate_rate=1e38, bias_rate=1e38, calibration=0)
    with pytest.raises(LincompileError, match=r"the error at 'h\.[01]\.attn' isn't finite after training"):
        transfer(teacher, linear(teacher), windows(), options)


def test_the_schedule_rises_then_falls() -> None:
    values = [schedule(i / 100, 0.1) for i in range(101)]
    assert max(values) == pytest.approx(1.0) and values[0] == 0.1 and values[-1] == pytest.approx(0.1)
    peak = values.index(max(values))
    assert peak == 10
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_each_part_is_clipped_alone() -> None:
    small, large = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    parts = [Part("small", {"w": small}, {"w": 1e-3}), Part("large", {"w": large}, {"w": 1e-3})]
    masters = Masters(parts, 0.0)
    small.grad, large.grad = torch.full((2,), 0.5), torch.full((2,), 300.0)
    masters.step(1.0, 1.0, 0)
    assert torch.equal(small.grad, torch.full((2,), 0.5))
    assert float(large.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_reports_are_of_the_stage(teacher: Program) -> None:
    report = transfer(teacher, linear(teacher), windows(), Transfer(steps=1))
    assert isinstance(report, TransferReport) and report.seconds > 0
