"""Gates that forget more slowly: by the factor where they are slow, hardly where they are fast, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from distil_models import linear, proved
from torch.nn import functional

import lincompile
from lincompile.lowering.options import Options
from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.half_lives import HalfLives
from lincompile.passes.linearization.methods import GATE_TEMPERATURE, logits_of_half_lives
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program


def biases(program: Program) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in program.graph_module.named_parameters() if "gate.bias" in name}


def half_lives(logits: torch.Tensor) -> torch.Tensor:
    return -math.log(2) * GATE_TEMPERATURE / functional.logsigmoid(logits.double())


def test_slow_features_are_stretched_and_fast_ones_stay_local() -> None:
    tokens = torch.tensor([2.0, 64.0, 1024.0, 131072.0], dtype=torch.float64)
    before = logits_of_half_lives(tokens)
    after = half_lives(before + math.log(4.0)) / half_lives(before)
    torch.testing.assert_close(after[2:], torch.full((2,), 4.0, dtype=torch.float64), rtol=0.02, atol=0)
    assert 1 < after[0] < 1.6 and after[0] < after[1] < 4


@pytest.mark.parametrize("attn", ["gla", "lawcat", "gated-delta"])
def test_every_gate_by_its_factor_and_nothing_else(attn: str) -> None:
    student = linear(proved(), attn)
    shared = student.clone()
    own, others = biases(student), {n: p.clone() for n, p in student.graph_module.named_parameters()}
    result = HalfLives(4.0).run(student)
    assert result.modified and result.report == {"factor": 4.0, "gates": len(own)} and len(own) == 2
    for name, parameter in result.program.graph_module.named_parameters():
        wanted = own[name] + math.log(4.0) if name in own else others[name]
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=1e-6)
        assert parameter.requires_grad == dict(shared.graph_module.named_parameters())[name].requires_grad
    assert all(torch.equal(value, own[name]) for name, value in biases(shared).items()), "weights that others share"
    tokens = zoo.tokens()
    assert not torch.equal(student(tokens), shared(tokens))


def test_the_factor_is_of_what_was_trained() -> None:
    student = linear(proved())
    own = biases(student)
    HalfLives(4.0).run(student)
    once = biases(student)
    again = HalfLives(4.0).run(student)
    assert not again.modified and all(torch.equal(once[name], value) for name, value in biases(student).items())
    assert HalfLives(1.0).run(student).modified
    for name, value in biases(student).items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=1e-6)


def test_attention_without_gates_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"--half-lives 4: no site has gates \(those of gla, lawcat"):
        HalfLives(4.0).run(linear(proved(), "hedgehog"))


@pytest.mark.parametrize("factor", [0.0, -2.0, math.inf, math.nan])
def test_factors_that_are_none(factor: float) -> None:
    with pytest.raises(LincompileError, match="the factor is a number above 0, such as 4"):
        HalfLives(factor)


def test_a_compiled_model_forgets_more_slowly_in_its_steps_too() -> None:
    module, example = zoo.build("llama-gqa")
    given: dict[str, Any] = {"example": example, "attn": "lawcat", "quant": "w6a8"}
    plain, longer = lincompile.compile(module, **given), lincompile.compile(module, half_lives=8.0, **given)
    assert longer.manifest()["options"]["half_lives"] == 8.0
    tokens = zoo.tokens()
    assert not torch.equal(
        plain.step(*_chunk(tokens), plain.step.initial_states(len(tokens)))[0], _logits(longer, tokens)
    )
    by_hand = Pipeline([HalfLives(8.0)])(lincompile.compile(module, example=example, attn="lawcat").program)
    found = biases(longer.program)
    for name, value in biases(by_hand).items():
        assert torch.equal(found[name], value)
    with pytest.raises(
        LincompileError, match="--half-lives is about gates of linear attention: not with --attn softmax"
    ):
        lincompile.compile(module, example=example, attn="softmax", half_lives=2.0)
    with pytest.raises(
        LincompileError, match="--half-lives is about gates of linear attention: not with --attn hedgehog"
    ):
        Options(attn="hedgehog", half_lives=2.0).check()  # before anything is trained


def _chunk(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return tokens, positions, torch.ones_like(tokens, dtype=torch.bool)


def _logits(compiled: lincompile.Compiled, tokens: torch.Tensor) -> torch.Tensor:
    return compiled.step(*_chunk(tokens), compiled.step.initial_states(len(tokens)))[0]
