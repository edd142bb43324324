"""Recorded steps: the same tokens and states as steps that are run; given up aloud where that isn't so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import lincompile
from lincompile.lowering import recorded
from lincompile.lowering.generate import Session, generate
from lincompile.passes.stateful import StepProgram

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9]]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Imitation:
    """Records as a CUDA graph does: everything is computed again into the same tensors. Counts what it is asked."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.recorded, self.launched, self.wrong = 0, 0, wrong

    def __call__(self, run: recorded.Run, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
        outputs = [value.clone() for value in run(inputs)]
        self.recorded += 1

        def launch() -> None:
            self.launched += 1
            for mine, value in zip(outputs, run(inputs), strict=True):
                mine.copy_(value + self.wrong if value.is_floating_point() else value)

        return launch, outputs


def stepped(**options: Any) -> StepProgram:
    torch.manual_seed(0)
    module = zoo.build("nanogpt-gqa-flag")[0]
    return lincompile.compile(module, example={"idx": zoo.tokens()}, attn="lawcat", **options).step


@pytest.fixture(scope="module")
def windowed() -> StepProgram:
    return stepped(window=4)


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch) -> Imitation:
    """Sessions on a CPU record, in a way of their own."""
    made = Imitation()
    monkeypatch.setattr(recorded, "cuda_graph", made)
    monkeypatch.setattr("lincompile.lowering.generate.recordable", lambda program, device: True)
    return made


def test_generation_is_the_same_and_most_steps_are_launched(windowed: StepProgram, imitation: Imitation) -> None:
    session, plain = Session(windowed), Session(windowed)
    plain.__dict__["_recorded"] = None
    for _ in range(2):
        wanted, got = (generate(s, PROMPTS, 12, chunk=3) for s in (plain, session))
        assert got.tokens == wanted.tokens
        torch.testing.assert_close(got.state.states, wanted.state.states)
    # The first two of a shape are run: of eleven steps with a full window nine are launched, then all.
    assert imitation.recorded >= 1 and imitation.launched >= 20


def test_what_a_caller_holds_stays(windowed: StepProgram, imitation: Imitation) -> None:
    session = Session(windowed)
    one = torch.tensor([[3]])
    states = generate(session, PROMPTS[:1], 1).state.states
    held = []
    for token in (3, 4, 5, 6, 7):
        given = [state.clone() for state in states]
        logits, new = session.step(one * 0 + token, one * 0 + 9, one > 0, states)
        held.append((logits, new, [logits.clone(), *(state.clone() for state in new)]))
        torch.testing.assert_close(states, given, rtol=0, atol=0)
    assert imitation.launched >= 3
    for logits, new, copies in held:
        torch.testing.assert_close([logits, *new], copies, rtol=0, atol=0)


def run(inputs: list[Tensor]) -> list[Tensor]:
    return [inputs[0] * 2, inputs[0] > 0]


def test_other_shapes_are_recorded_anew_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 2)
    imitation = Imitation()
    steps = recorded.Recorded(run, CPU, imitation)
    for size in (1, 2, 3, 1):
        for count in range(4):
            x = torch.full((size,), float(count))
            torch.testing.assert_close(steps([x]), run([x]))
    assert imitation.recorded == 4 and [key[0][0] for key in steps.recordings] == [(3,), (1,)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Imitation(wrong=0.1), "they gave something else when recorded"),
        (lambda run, inputs: torch.zeros(2) @ torch.zeros(3), r"they couldn't be recorded \(.*size"),
    ],
)
def test_what_differs_or_fails_is_not_used(record: Any, message: str) -> None:
    steps = recorded.Recorded(run, CPU, record)
    x = torch.arange(4.0)
    steps([x])
    with pytest.warns(UserWarning, match=rf"steps run one kernel after the other, and slower: {message}"):
        torch.testing.assert_close(steps([x]), run([x]))
    with warnings.catch_warnings(action="error"):  # said once
        for _ in range(3):
            torch.testing.assert_close(steps([x]), run([x]))


def test_outputs_that_are_not_finite_are_compared_too() -> None:
    bad = torch.tensor([1.0, torch.nan])
    assert recorded._same(bad, bad.clone()) and not recorded._same(bad, torch.ones(2))
    assert not recorded._same(torch.ones(2), torch.ones(3)) and not recorded._same(torch.ones(2), torch.ones(2).half())


def test_autocast_runs_steps_as_they_are() -> None:
    imitation = Imitation()
    steps = recorded.Recorded(run, CPU, imitation)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            steps([torch.ones(3)])
    assert not imitation.recorded


def test_what_may_be_recorded(windowed: StepProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded.recordable(windowed, GPU) and not recorded.recordable(windowed, CPU)
    assert not recorded.recordable(stepped(keep_softmax="1.0"), GPU), "its keys and values grow with every token"
    monkeypatch.setenv("LINCOMPILE_CUDA_GRAPHS", "0")
    assert not recorded.recordable(windowed, GPU)


def test_a_session_of_another_kind_isnt_recorded(windowed: StepProgram, imitation: Imitation) -> None:
    class Own(Session):
        pass

    assert Own(windowed)._recorded is None and Session(windowed)._recorded is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    step = stepped(window=4, device="cuda")
    session, plain = Session(step), Session(step)
    plain.__dict__["_recorded"] = None
    with warnings.catch_warnings(action="error"):
        wanted, got = (generate(s, PROMPTS, 24, chunk=3) for s in (plain, session))
    assert got.tokens == wanted.tokens
    assert session._recorded is not None and session._recorded.recordings
    torch.testing.assert_close(got.state.states, wanted.state.states)
