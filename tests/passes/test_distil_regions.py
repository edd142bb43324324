"""Training with compiled regions: the same losses and weights as without, and left aside where it isn't so."""

from __future__ import annotations

import functools
from typing import Any

import distil_models as models
import pytest
import torch
import zoo
from torch import Tensor, nn

from lincompile.passes.capture import capture
from lincompile.passes.distil import divergence, logits, regions
from lincompile.passes.distil.instrument import TrainingGraph, instead, unpadded
from lincompile.passes.distil.logits import LogitDistillation, distil_logits
from lincompile.passes.distil.lora import add_lora
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile as far as autograd's graphs: a C++ compiler would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    divergence.compiled_rows.cache_clear()


def kinds_and_calls(graph: TrainingGraph) -> tuple[int, int]:
    kinds = regions.compile_regions(graph.graph_module, graph.autocast)
    calls = [node for node in graph.graph_module.graph.nodes if str(node.target).startswith(regions.PREFIX)]
    return kinds, len(calls)


def test_layers_share_their_regions() -> None:
    graph = unpadded(Pipeline([ProveAttention()])(capture(*zoo.build("llama"))))
    tokens = zoo.tokens()
    layers = len(graph.program.sites)
    with torch.no_grad():
        before = logits.logits_of(graph, tokens)
        kinds, calls = kinds_and_calls(graph)
        torch.testing.assert_close(logits.logits_of(graph, tokens), before, rtol=0, atol=0)
    # the angles, the first norm and the last; rotations of q and of k, two norms with their sums, an activation
    assert kinds <= 8 and calls > 4 * layers


def test_low_rank_sums_are_regions_too() -> None:
    teacher = models.proved()
    graph = instead(teacher, models.linear(teacher))
    add_lora(graph.graph_module, 2)
    regions.compile_regions(graph.graph_module, torch.bfloat16)
    sums = [node for node in graph.graph_module.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert not sums


@pytest.mark.parametrize("window", [None, 8])
def test_compiled_training_equals_plain(quick: None, window: int | None) -> None:
    results = []
    for compile in (False, True):
        notes: list[str] = []
        teacher = models.proved()
        student = models.linear(teacher, window=window) if window else models.linear(teacher)
        moved = transfer(teacher, student, models.windows(), Transfer(steps=3, compile=compile), note=notes.append)
        options = LogitDistillation(steps=3, compile=compile, train="lora:2")
        learnt = distil_logits(teacher, student, models.windows(), options, note=notes.append)
        results.append((torch.tensor([*moved.losses, *learnt.losses]), models.trained(student)))
        assert not notes
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
    for name, wanted in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], wanted, rtol=1e-2, atol=1e-3)


def wrong_loss(x: Tensor) -> Tensor:
    return (x * 1.1).square().sum()


def wrong_gradient(x: Tensor) -> Tensor:
    return x.square().sum() + (x - x.detach()).sum()


def not_a_number(x: Tensor) -> Tensor:
    return x.square().sum() * float("nan")


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (wrong_loss, "1 of 1 losses"),
        (wrong_gradient, "1 of 2 gradients"),
        (not_a_number, "1 of 1 losses"),
        (failing, "no such instruction"),
    ],
)
def test_compiled_code_that_computes_something_else_is_left_aside(other: Any, says: str) -> None:
    used, unused = nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(3))
    used.grad = torch.ones(50)
    notes: list[str] = []

    def learn(compiled: bool) -> Tensor:
        loss: Tensor = (other if compiled else lambda x: x.square().sum())(used)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    assert not regions.agrees(learn, [used, unused], notes.append)
    assert len(notes) == 1 and says in notes[0] and "torch.compile" in notes[0]
    assert torch.equal(used.grad, torch.ones(50)) and unused.grad is None, "gradients are left as they were"
    assert regions.agrees(lambda compiled: learn(False), [used, unused], notes.append) and len(notes) == 1


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_gradient_may_differ_by_what_rounding_moves(factor: float) -> None:
    """One gradient turns with every rounding of its parameter; the other one is steady, and held to the limit."""
    torch.manual_seed(0)
    rough, steady = nn.Parameter(1 + torch.rand(40)), nn.Parameter(torch.ones(40))
    before = rough.detach().clone()
    notes: list[str] = []

    def learn(compiled: bool) -> Tensor:
        nudged = rough * (1 + 2.0**-10) if compiled else rough
        loss = torch.sin(nudged * 1500).sum() / 1500 + (factor if compiled else 1.0) * steady.square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return torch.ones(())

    assert regions.agrees(learn, [rough, steady], notes.append) == (factor == 1.0)
    assert len(notes) == (factor != 1.0) and all("1 of 2 gradients" in note and "(40,)" in note for note in notes)
    assert torch.equal(rough, before) and torch.equal(steady, torch.ones(40)), "parameters are put back"


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("overflows", [False, True])
def test_a_gradient_of_another_size_is_never_rounding(factor: float, overflows: bool) -> None:
    """However far rounding moves a gradient's direction; and a moved one that overflows excuses nothing."""
    torch.manual_seed(0)
    rough = nn.Parameter(1 + torch.rand(40))
    before, notes, calls = rough.detach().clone(), [], []

    def learn(compiled: bool) -> Tensor:
        calls.append(compiled)
        (torch.sin(rough * 1500).sum() / 1500).backward()  # type: ignore[no-untyped-call]
        assert rough.grad is not None
        if compiled:
            rough.grad *= factor
        if overflows and len(calls) == 3:
            rough.grad[0] = float("inf")
        return torch.ones(())

    assert not regions.agrees(learn, [rough], notes.append)
    assert calls == [False, True, False] and "1 of 1 gradients" in notes[0]
    assert torch.equal(rough, before)


def test_no_gradient_at_all_is_the_same_for_both() -> None:
    unused = nn.Parameter(torch.ones(3))
    assert regions.agrees(lambda compiled: torch.ones(()), [unused], lambda note: pytest.fail(note))


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_are_put_back_where_the_moved_run_fails(shared: bool) -> None:
    one = nn.Parameter(torch.rand(7))
    parameters = [one, nn.Parameter(one.detach() if shared else torch.rand(7))]
    before, calls = [parameter.detach().clone() for parameter in parameters], []

    def learn(compiled: bool) -> Tensor:
        calls.append(compiled)
        if len(calls) == 3:
            assert not torch.equal(one, before[0])
            raise torch.OutOfMemoryError
        (one.square().sum() * (2 if compiled else 1)).backward()  # type: ignore[no-untyped-call]
        return torch.ones(())

    with pytest.raises(torch.OutOfMemoryError):
        regions.agrees(learn, parameters, lambda note: None)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_memory_errors_pass_through() -> None:
    def learn(compiled: bool) -> Tensor:
        if compiled:
            raise torch.OutOfMemoryError("full")
        return torch.zeros(())

    with pytest.raises(torch.OutOfMemoryError):
        regions.agrees(learn, [nn.Parameter(torch.zeros(1))], print)


def test_wrong_code_is_noted_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, **options: Any) -> Any:
        def run(*operands: Any) -> Any:
            result = module(*operands)
            return tuple(x * 3 if torch.is_tensor(x) and x.is_floating_point() else x for x in result)

        return run

    teacher = models.proved()
    plain, other = models.linear(teacher), models.linear(teacher)
    wanted = transfer(teacher, plain, models.windows(), Transfer(steps=2, compile=False))
    monkeypatch.setattr(torch, "compile", broken)
    notes: list[str] = []
    got = transfer(teacher, other, models.windows(), Transfer(steps=2, compile=True), note=notes.append)
    assert len(notes) == 1 and "losses" in notes[0]
    assert got.losses == wanted.losses
