"""Log-probabilities of continuations: one by one, in padded batches, and written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lincompile.lowering.evaluation.score import Request, Scorer
from lincompile.lowering.generate import Session
from lincompile.passes.errors import LincompileError

REQUESTS: list[Request] = [
    ([4, 5, 6], [7, 8]),
    ([4, 5, 6], [9]),
    ([4, 5, 6], [10]),
    ([11, 12, 13, 14, 15, 16, 17], [18, 19, 20]),
    ([9], []),
    ([21], [22, 23, 24, 25]),
]


@pytest.fixture(scope="module")
def session(toy: SimpleNamespace) -> Session:
    return Session(toy.step)


def by_hand(session: Session, request: Request) -> tuple[float, bool]:
    context, continuation = request
    tokens = torch.tensor([context + continuation])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logits, _ = session.step(tokens, torch.arange(tokens.shape[1])[None], mask, session.initial_states(1))
    rows = logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    chosen = [float(rows[index, token]) for index, token in enumerate(continuation)]
    return sum(chosen), rows.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("chunk", [3, 256])
def test_equal_one_forward_each(session: Session, batch: int, chunk: int) -> None:
    scorer = Scorer(session, 32, chunk)
    told: dict[int, tuple[float, bool]] = {}
    answers = scorer.score(REQUESTS, batch, on_answer=told.__setitem__)
    assert [told[index] for index in range(len(REQUESTS))] == answers
    for request, (score, greedy) in zip(REQUESTS, answers, strict=True):
        expected = by_hand(session, request) if request[1] else (0.0, True)
        assert score == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


@pytest.mark.parametrize("batch", [1, 8])
def test_contexts_are_cut_on_the_left(session: Session, batch: int) -> None:
    scorer = Scorer(session, 5)
    (cut,) = scorer.score([([4, 5, 6, 7, 8], [9, 10])], batch)
    assert cut[0] == pytest.approx(by_hand(session, ([5, 6, 7, 8], [9, 10]))[0], abs=1e-4)
    with pytest.raises(LincompileError, match="a continuation of 7 tokens exceeds max_length 5"):
        scorer.score([([4], [5] * 7)], batch)


@pytest.mark.parametrize("batch", [1, 8])
def test_without_a_context_nothing_is_scored(session: Session, batch: int) -> None:
    with pytest.raises(LincompileError, match=r"empty|without a context"):
        Scorer(session, 32).score([([], [70, 71]), ([4, 5, 6], [7])], batch)


@pytest.mark.parametrize("batch", [1, 8])
def test_logits_that_are_not_finite_score_nothing(
    session: Session, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = session.step
    monkeypatch.setattr(
        session, "step", lambda *given: (lambda logits, states: (logits * torch.nan, states))(*step(*given))
    )
    with pytest.raises(LincompileError, match=r"logits are not finite \(NaN or inf\): its continuations have no score"):
        Scorer(session, 32).score(REQUESTS, batch)


def test_one_token_answers_share_a_row(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = Scorer._ends

    def counted(self: Scorer, some: list[list[int]], count: int) -> torch.Tensor:
        rows.append(len(some))
        return plain(self, some, count)

    monkeypatch.setattr(Scorer, "_ends", counted)
    Scorer(session, 32).score(REQUESTS, 64)
    assert rows == [4], "two of the five continuations are answers of one token to one context"
