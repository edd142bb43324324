"""Gates that start where the teacher's heads look."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distil_models import LENGTH, linear, proved, windows

from lincompile.passes.distil.calibrate import calibrate, half_lives
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.errors import LincompileError
from lincompile.passes.linearization.methods import GATE_TEMPERATURE
from lincompile.passes.program import Program


def biases(program: Program) -> list[torch.Tensor]:
    return [p.detach().clone() for n, p in program.graph_module.named_parameters() if n.endswith("gate.bias")]


def test_half_lives_are_the_quantiles_of_distances() -> None:
    profile = torch.zeros(2, 100, dtype=torch.float64)
    profile[0, 10] = 3.0
    profile[1, :] = 1.0
    found = half_lives(profile, 4)
    assert found[0].tolist() == [10.0, 10.0, 10.0, 4096.0], "one in four keeps its place in the even spread"
    assert found[1].tolist() == pytest.approx([12, 37, 62, 4096], abs=1)
    assert half_lives(profile, 4, longest=65536.0)[1].tolist() == pytest.approx([12, 37, 62, 65536], abs=1)
    assert half_lives(torch.zeros(1, 8, dtype=torch.float64), 2).isfinite().all(), (
        "a head that rests on the first token"
    )


def test_gates_start_with_the_distances_of_dense_weights() -> None:
    teacher = proved()
    student = linear(teacher)
    tokens = windows().step(0)
    assert calibrate(teacher, student, tokens) == 2
    site = teacher.sites[0]
    assert site.node is not None
    q, k = site.node.args[:2]
    twin = teacher.clone()
    nodes = {node.name: node for node in twin.graph_module.graph.nodes}
    next(n for n in twin.graph_module.graph.nodes if n.op == "output").args = ((nodes[q.name], nodes[k.name]),)  # type: ignore[union-attr]
    twin.graph_module.recompile()
    with torch.no_grad():
        queries, keys = twin.graph_module(tokens)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    scores = queries @ keys.repeat_interleave(heads // kv_heads, 1).mT * site.scale
    weights = scores.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    profile = torch.zeros(kv_heads, LENGTH, dtype=torch.float64)
    for i in range(LENGTH):
        for j in range(1, i + 1):
            profile[:, i - j] += weights[:, :, i, j].view(len(tokens), kv_heads, -1).sum((0, 2)).double()
    bias = biases(student)[0].view(kv_heads, -1).double()
    got = GATE_TEMPERATURE / -torch.log2(torch.sigmoid(bias))
    torch.testing.assert_close(got, half_lives(profile, bias.shape[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("attn", "window"), [("lawcat", 4), ("gla", 0), ("hedgehog", 0), ("gated-delta", 0)])
def test_other_sites_are_left_alone(attn: str, window: int) -> None:
    teacher = proved()
    student = linear(teacher, attn, window=window)
    before = biases(student)
    assert calibrate(teacher, student, windows().step(0)) == 0
    assert all(map(torch.equal, before, biases(student)))


def test_trained_gates_are_not_started_again(tmp_path: Path) -> None:
    teacher = proved()
    student = linear(teacher)
    transfer(teacher, student, windows(), Transfer(steps=1))
    assert calibrate(teacher, student, windows().step(0)) == 0
    plain = linear(teacher)
    transfer(teacher, plain, windows(), Transfer(steps=1, calibration=0))
    assert not torch.equal(biases(plain)[0], biases(student)[0])


def test_the_slowest_feature_remembers_as_far_as_asked() -> None:
    teacher = proved()
    student = linear(teacher)
    transfer(teacher, student, windows(), Transfer(steps=1, bias_rate=1e-9, longest=65536.0))
    slowest = GATE_TEMPERATURE / -torch.log2(torch.sigmoid(biases(student)[0].double().max()))
    assert slowest.item() == pytest.approx(65536, rel=0.05)
    with pytest.raises(LincompileError, match=r"longest=10.*the slowest feature halves in over 64 tokens"):
        Transfer(longest=10)
