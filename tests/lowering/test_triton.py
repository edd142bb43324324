"""Lowering to Triton: what is fused, that it computes the same, and what is left alone with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import lincompile
from lincompile.lowering import triton as lowering
from lincompile.lowering.fusion import stages
from lincompile.lowering.fusion.chains import evaluate_chain
from lincompile.lowering.generate import Session, generate
from lincompile.lowering.package import open_artefact
from lincompile.passes.graph import aten
from lincompile.passes.stateful import StepProgram

GATED = (torch.ops.lincompile.decay_gate.default, torch.ops.lincompile.lawcat_inputs.default)


def counts(step: StepProgram) -> dict[str, int]:
    names = [str(node.target) for node in step.graph_module.graph.nodes if node.op == "call_function"]
    return {name: names.count(name) for name in set(names)}


@pytest.fixture(scope="module")
def compiled() -> lincompile.Compiled:
    module, example = zoo.build("nanogpt-gqa-repeat")
    compiled = lincompile.compile(module, example=example, attn="lawcat")
    with torch.no_grad():
        for name, parameter in compiled.step.graph_module.named_parameters():
            if name.startswith("lincompile_attention"):
                parameter += 0.3 * torch.randn_like(parameter)
    return compiled


def test_a_chain_is_run_where_its_leaves_are() -> None:
    """A program on a GPU creates constants there; its chains are proved on a CPU. (Here meta stands for the GPU.)"""
    graph = torch.fx.Graph()
    leaf = graph.placeholder("leaf")
    ones = graph.call_function(aten.full.default, ([3], 1.0), {"device": torch.device("meta")})
    total = graph.call_function(aten.add.Tensor, (leaf, ones))
    assert evaluate_chain(total, {leaf: torch.zeros(3)}).tolist() == [1.0, 1.0, 1.0]


def test_lawcat_is_fused_and_computes_the_same(compiled: lincompile.Compiled) -> None:
    before = counts(compiled.step)
    lowered, report = lowering.lower(compiled.step)
    assert (report.features, report.gates, report.kept) == (4, 2, {})
    after = counts(lowered)
    assert after["lincompile.hedgehog_features.default"] == 4 and after["lincompile.decay_gate.default"] == 2
    assert "lincompile.short_conv.default" not in after and "aten.softplus.default" not in after
    assert counts(compiled.step) == before, "the program itself is left as it is"

    tokens = torch.randint(0, 97, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, :4] = False
    results = []
    for step in (compiled.step, lowered):
        states: list[Tensor] = step.initial_states(2)
        outputs = []
        for part in (slice(0, 6), slice(6, 7), slice(7, 11)):
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, part]
            logits, states = step(tokens[:, part], positions, mask[:, part], states)
            outputs.append(logits)
        results.append([torch.cat(outputs, 1), *states])
    for have, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_the_whole_sequence_form(compiled: lincompile.Compiled) -> None:
    twin = compiled.program.clone()
    report = lowering.fuse_stages(twin.graph_module)
    assert (report.features, report.gates, report.kept) == (4, 2, {})
    tokens = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(twin(tokens), compiled.program(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("attn", "fused"), [("gla", (0, 2)), ("hedgehog", (4, 0)), ("gated-delta", (0, 0))])
def test_the_other_methods(attn: str, fused: tuple[int, int]) -> None:
    module, example = zoo.build("nanogpt")
    compiled = lincompile.compile(module, example=example, attn=attn)
    lowered, report = lowering.lower(compiled.step)
    assert (report.features, report.gates) == fused and not report.kept
    a, b = (generate(Session(step), [[1, 2, 3, 4]], 4) for step in (compiled.step, lowered))
    torch.testing.assert_close(a.state.logits, b.state.logits)


def test_a_chain_that_means_something_else_is_kept(compiled: lincompile.Compiled) -> None:
    """The pattern alone would accept a softmax over tokens instead of features; the proof doesn't."""
    twin, _ = lowering.lower(compiled.step)
    twin.graph_module = lowering.share_tensors(compiled.step.graph_module, {})
    graph = twin.graph_module.graph
    wrong = next(node for node in graph.nodes if node.target is aten.softmax.int)
    wrong.args = (wrong.args[0], -2)
    gate = next(node for node in graph.nodes if node.target is aten.softplus.default)
    gate.args = (gate.args[0], 2.0)
    shared = next(node for node in graph.nodes if node.target is torch.ops.lincompile.short_conv.default)
    report = lowering.fuse_stages(twin.graph_module)
    assert shared in graph.nodes
    assert (report.features, report.gates) == (3, 1)
    assert any("the chain and the op differ by" in reason for reason in report.kept.values())
    assert len(report.kept) == 2 and "2 stay as they are" in report.summary()


@pytest.mark.parametrize("attn", ["lawcat", "gla"])
@pytest.mark.parametrize("lowest", [-1.0, None])
def test_gates_with_and_without_a_floor(attn: str, lowest: float | None) -> None:
    """Without one: as in artefacts that were saved before gates had a floor."""
    module, example = zoo.build("nanogpt")
    compiled = lincompile.compile(module, example=example, attn=attn, lowest=lowest)
    with torch.no_grad():
        for name, parameter in compiled.step.graph_module.named_parameters():
            if name.endswith("gate.bias"):
                parameter[::2] = -40.0
    assert counts(compiled.step).get("aten.clamp.default", 0) == (0 if lowest is None else 2)
    for decoding in (False, True):
        lowered, report = lowering.lower(compiled.step, decoding=decoding)
        assert report.gates == 2 and not report.kept
        floors = [node.args[-1] for node in lowered.graph_module.graph.nodes if node.target in GATED]
        assert floors == [lowest] * 2
        a, b = (generate(Session(step), [[1, 2, 3, 4]], 4) for step in (compiled.step, lowered))
        torch.testing.assert_close(a.state.logits, b.state.logits)


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ((None, -1.0), "bounded by more than a floor"),
        ((-1.0, -0.5), "bounded by more than a floor"),
        (None, "isn't the gate's temperature"),
        ((0.5,), "lowest must be below 0"),
    ],
)
def test_what_is_no_floor_is_kept(bounds: tuple[Any, ...] | None, reason: str) -> None:
    """Another bound, two of them, or a tensor (None) doesn't become a gate's floor."""
    module, example = zoo.build("nanogpt")
    compiled = lincompile.compile(module, example=example, attn="lawcat")
    graph = compiled.step.graph_module.graph
    for node in [node for node in graph.nodes if node.target is aten.clamp.default]:
        if bounds is None:
            with graph.inserting_before(node):
                limit = graph.call_function(aten.full_like.default, (node.args[0], -1.0))
            node.target, node.args = aten.clamp.Tensor, (node.args[0], limit)
        else:
            node.args = (node.args[0], *bounds)
    for decoding in (False, True):
        lowered, report = lowering.lower(compiled.step, decoding=decoding)
        assert report.gates == report.inputs == 0
        assert [found for found in report.kept.values() if reason in found]
        assert not [node for node in lowered.graph_module.graph.nodes if node.target in GATED]


def test_the_proof_reaches_the_floor(compiled: lincompile.Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that overlooked it would be found out by the random inputs."""
    monkeypatch.setattr(stages, "_without_floor", lambda node: (node.args[0], None))
    _, report = lowering.lower(compiled.step)
    assert report.gates == 0
    assert any("the chain and the op differ by" in reason for reason in report.kept.values())


def test_a_quantized_gate_is_kept_with_the_reason() -> None:
    module, example = zoo.build("nanogpt")
    compiled = lincompile.compile(module, example=example, attn="gla")
    graph = compiled.step.graph_module.graph
    for node in graph.nodes:
        if node.target is aten.linear.default and str(node.args[1]).endswith("gate_up"):
            with graph.inserting_before(node):
                node.args = (node.args[0], graph.call_function(aten.clone.default, (node.args[1],)), node.args[2])
    _, report = lowering.lower(compiled.step)
    assert report.gates == 0
    assert all("the gate's weight is computed or quantized" in reason for reason in report.kept.values())


def test_target_triton_says_what_it_did_and_keeps_the_artefact_plain(tmp_path: Path) -> None:
    module, example = zoo.build("nanogpt")
    compiled = lincompile.compile(module, example=example, attn="lawcat", target="triton")
    assert any("4 feature chains and 2 gates became one op each" in note for note in compiled.notes)
    assert "lincompile.lawcat_inputs.default" in counts(compiled.session.program)
    artefact = open_artefact(compiled.save(tmp_path / "out"))
    assert "lincompile.hedgehog_features.default" not in counts(artefact.step)
    lowered, report = lowering.lower(artefact.step)
    assert (report.features, report.gates, report.kept) == (4, 2, {})
    a, b = (generate(Session(step), [[1, 2, 3, 4]], 4) for step in (artefact.step, lowered))
    assert a.tokens == b.tokens
