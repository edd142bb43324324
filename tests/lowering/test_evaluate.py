"""Perplexity: the same figure from a window-by-window loop written out, from one chunk and from many."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import zoo

from lincompile.lowering.evaluation.perplexity import bench, logits_of_program, logits_of_session, perplexity
from lincompile.lowering.generate import Session
from lincompile.passes.capture import capture
from lincompile.passes.errors import LincompileError
from lincompile.passes.stateful import make_full

IDS = torch.randint(40, (70,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def session(toy: SimpleNamespace) -> Session:
    return Session(toy.step)


@pytest.mark.parametrize("chunk", [5, 64])
def test_equals_the_definition(session: Session, chunk: int) -> None:
    result = perplexity(logits_of_session(session, chunk), IDS, 32)
    total, count = 0.0, 0
    for window in (IDS[:32], IDS[32:64], IDS[64:]):
        tokens = torch.tensor([window])
        positions = torch.arange(len(window))[None]
        logits, _ = session.step(
            tokens, positions, torch.ones_like(tokens, dtype=torch.bool), session.initial_states(1)
        )
        log_probabilities = logits[0].double().log_softmax(-1)
        total -= sum(float(log_probabilities[i, window[i + 1]]) for i in range(len(window) - 1))
        count += len(window) - 1
    assert result.tokens == count == 31 + 31 + 5
    assert result.nll == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_tokens_bounds_the_predicted_tokens(session: Session) -> None:
    few = perplexity(logits_of_session(session), IDS, 32, tokens=40)
    assert few.tokens == 40
    # 31 from the first window, 9 from the second: the text ends after 32 + 10 tokens
    assert few.nll == pytest.approx(perplexity(logits_of_session(session), IDS[:42], 32).nll, rel=1e-6)


@pytest.mark.parametrize(
    ("ids", "context", "tokens", "message"),
    [([1], 8, None, "1 tokens"), ([], 8, None, "0 tokens"), (IDS, 1, None, "context"), (IDS, 8, 0, "number of tokens")],
)
def test_nothing_to_predict(session: Session, ids: list[int], context: int, tokens: int | None, message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        perplexity(logits_of_session(session), ids, context, tokens=tokens)


@pytest.mark.parametrize("ids", [IDS, IDS[:2], [0] * 40])
def test_a_bidirectional_model_has_no_perplexity(ids: list[int]) -> None:
    program = capture(*zoo.build("nanogpt-bidirectional"))
    for logits_of in (logits_of_program(program), logits_of_session(Session(make_full(program)))):
        with pytest.raises(LincompileError, match=r"isn't causal.*perplexity has no meaning"):
            perplexity(logits_of, ids, 32)


def test_a_causal_model_without_states_has_one() -> None:
    program = capture(*zoo.build("nanogpt"))
    whole = perplexity(logits_of_session(Session(make_full(program))), IDS, 32)
    assert whole.nll == pytest.approx(perplexity(logits_of_program(program), IDS, 32).nll, rel=1e-5)


def test_bench_measures_and_respects_positions(session: Session) -> None:
    result = bench(session, context=20, new_tokens=4)
    assert result["prefill_tokens_per_second"] > 0
    assert result["decode_tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 1 << 20
    with pytest.raises(LincompileError, match="64 positions"):
        bench(session, context=64)
