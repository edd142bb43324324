"""Recorded steps: the same tokens and states as steps that are run; given up aloud where that isn't so."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import lincompile
from lincompile.lowering import recorded, room
from lincompile.lowering.generate import Session, generate
from lincompile.passes.stateful import StepProgram

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9]]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Imitation:
    """Records as a CUDA graph does: everything is computed again into the same tensors. Counts what it is asked."""

    def __init__(self, wrong: float = 0.0, stale: bool = False) -> None:
        self.recorded, self.launched, self.wrong, self.stale = 0, 0, wrong, stale

    def __call__(self, run: recorded.Run, inputs: list[Tensor], pool: Any) -> tuple[Callable[[], None], list[Tensor]]:
        outputs = [value.clone() for value in run(inputs)]
        self.recorded += 1

        def launch() -> None:
            self.launched += 1
            for mine, value in zip(outputs, run(inputs), strict=True):
                if not self.stale:
                    mine.copy_(value + self.wrong if value.is_floating_point() else value)

        return launch, outputs


def stepped(model: str = "nanogpt-gqa-flag", **options: Any) -> StepProgram:
    torch.manual_seed(0)
    module, example = zoo.build(model)
    return lincompile.compile(module, example=example, **{"attn": "lawcat"} | options).step


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
    for _ in range(3):
        wanted, got = (generate(s, PROMPTS, 12, chunk=3) for s in (plain, session))
        assert got.tokens == wanted.tokens
        torch.testing.assert_close(got.state.states, wanted.state.states)
    # One shape: two rows, a token, a full window. Neither chunks of the prompt nor caches that still grow are recorded.
    assert imitation.recorded == 1 and imitation.launched >= 25


def test_what_a_caller_holds_stays(windowed: StepProgram, imitation: Imitation) -> None:
    session = Session(windowed)
    one = torch.tensor([[3]])
    states = generate(session, PROMPTS[:1], 1).state.states
    held = []
    for token in (3, 4, 5, 6, 7, 8):
        given = [state.clone() for state in states]
        logits, new = session.step(one * 0 + token, one * 0 + 9, one > 0, states)
        held.append((logits, new, [logits.clone(), *(state.clone() for state in new)]))
        torch.testing.assert_close(states, given, rtol=0, atol=0)
    assert imitation.launched >= 3
    for logits, new, copies in held:
        torch.testing.assert_close([logits, *new], copies, rtol=0, atol=0)


def run(inputs: list[Tensor]) -> list[Tensor]:
    """A step without states: tokens, positions, mask → logits."""
    return [inputs[0].float() * 2]


def given(rows: int, token: float = 3.0, length: int = 1) -> list[Tensor]:
    return [torch.full((rows, length), token), torch.zeros(rows, length), torch.ones(rows, length)]


def test_other_shapes_are_recorded_anew_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 2)
    imitation = Imitation()
    steps = recorded.Recorded(run, CPU, record=imitation)
    for rows in (1, 2, 3, 1):
        for count in range(5):
            torch.testing.assert_close(steps(given(rows, count)), run(given(rows, count)))
    assert imitation.recorded == 4 and [key[0][0] for key in steps.recordings] == [(3, 1), (1, 1)]


@pytest.mark.parametrize("inputs", [given(2, length=3), [*given(1), torch.zeros(1, 4)]])
def test_chunks_and_steps_with_growing_states_are_run(inputs: list[Tensor]) -> None:
    imitation = Imitation()
    steps = recorded.Recorded(lambda x: [x[0], *(torch.cat([s, s]) for s in x[3:])], CPU, record=imitation)
    for _ in range(5):
        steps(inputs)
    assert not imitation.recorded


def test_chunks_are_recorded_where_one_tokens_logits_come_of_them(imitation: Imitation) -> None:
    session, plain = Session(stepped()), Session(stepped())
    plain.__dict__["_recorded"] = plain._last.__dict__["_recorded"] = None  # type: ignore[union-attr]
    prompt = [[index % 20 for index in range(30)]]
    wanted, got = (generate(s, prompt, 1, chunk=5) for s in (plain, session))
    assert imitation.recorded == 1 and imitation.launched >= 3
    assert got.tokens == wanted.tokens
    torch.testing.assert_close(got.state.states, wanted.state.states)


def test_the_rest_of_a_prompt_is_recorded_when_its_length_has_come_often(imitation: Imitation) -> None:
    session = Session(stepped())

    def read(length: int) -> None:
        generate(session, [[index % 20 for index in range(length)]], 1, chunk=10)

    read(30)  # three chunks
    assert imitation.recorded == 1
    for rest in (2, 3, 4, 5, 2, 3, 4, 5):
        read(20 + rest)
    assert imitation.recorded == 1, "rests of lengths that have come less often are run"
    read(22)
    assert imitation.recorded == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Imitation(wrong=0.1), "they gave something else when recorded"),
        (Imitation(stale=True), "they gave something else when recorded"),
        (lambda run, inputs, pool: torch.zeros(2) @ torch.zeros(3), r"they couldn't be recorded \(.*size"),
    ],
)
def test_what_differs_or_fails_is_not_used(record: Any, message: str) -> None:
    steps = recorded.Recorded(run, CPU, record=record)
    steps(given(2)), steps(given(2))
    with pytest.warns(UserWarning, match=rf"steps run one kernel after the other, and slower: {message}"):
        torch.testing.assert_close(steps(given(2)), run(given(2)))
    with warnings.catch_warnings(action="error"):  # said once
        for _ in range(3):
            torch.testing.assert_close(steps(given(2)), run(given(2)))


def test_outputs_that_are_not_finite_are_compared_too() -> None:
    bad, inf = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])
    assert recorded._same(bad, bad.clone()) and not recorded._same(bad, torch.ones(2))
    assert recorded._same(inf, inf.clone()) and not recorded._same(inf, torch.tensor([-1.0, torch.inf]))
    assert not recorded._same(inf, -inf) and not recorded._same(torch.ones(2), bad)
    assert not recorded._same(torch.ones(2), torch.ones(3)) and not recorded._same(torch.ones(2), torch.ones(2).half())


def test_inference_mode_and_autocast() -> None:
    imitation = Imitation()
    steps = recorded.Recorded(run, CPU, record=imitation)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            steps(given(2))
    assert not imitation.recorded, "what is recorded under autocast isn't the step"
    with torch.inference_mode():
        for _ in range(4):
            steps(given(2))
    assert imitation.recorded == 1
    torch.testing.assert_close(steps(given(2, 5.0)), run(given(2, 5.0)))


def test_threads_get_their_own_results() -> None:
    steps = recorded.Recorded(run, CPU, record=Imitation())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda token: float(steps(given(1, token))[0]), map(float, range(200))))
    assert found == [2.0 * token for token in range(200)]


def test_weights_that_moved_are_recorded_anew() -> None:
    layer, imitation = torch.nn.Linear(1, 3), Imitation()
    steps = recorded.Recorded(lambda inputs: [layer(inputs[0])[:, None]], CPU, recorded.places_of(layer), imitation)
    x = given(2)
    with torch.no_grad():
        for _ in range(4):
            steps(x)
        layer.weight += 1  # in place: a recording reads what is there
        torch.testing.assert_close(steps(x)[0][:, 0], layer(x[0]))
        assert imitation.recorded == 1
        layer.weight = torch.nn.Parameter(torch.randn(3, 1))
        for _ in range(4):
            torch.testing.assert_close(steps(x)[0][:, 0], layer(x[0]))
    assert imitation.recorded == 2


def test_copies_of_a_session_leave_recordings_behind(windowed: StepProgram, imitation: Imitation) -> None:
    session = Session(windowed)
    wanted = generate(session, PROMPTS, 12)
    assert imitation.recorded == 1
    twin = copy.deepcopy(session)
    with torch.no_grad():
        for parameter in twin.program.graph_module.parameters():
            parameter.zero_()
    assert generate(session, PROMPTS, 12).tokens == wanted.tokens != generate(twin, PROMPTS, 12).tokens
    assert generate(pickle.loads(pickle.dumps(session)), PROMPTS, 12).tokens == wanted.tokens


def test_what_may_be_recorded(windowed: StepProgram) -> None:
    assert recorded.recordable(windowed, GPU) and not recorded.recordable(windowed, CPU)
    assert not room.Room.of(windowed), "a window is full at some time"
    hybrid = stepped(keep_softmax="1.0")
    roles = [hybrid.states[place - room.STATES_AT].role for place in room.Room.of(hybrid).axes]
    assert sorted(roles) == ["key", "mask", "value"]
    assert recorded.recordable(hybrid, GPU) and not recorded.recordable(hybrid, CPU)


def test_room_grows_by_a_quarter_at_most() -> None:
    assert [room.wide(n) for n in (0, 1, 255, 256, 1023, 1024, 5000)] == [255, 255, 255, 511, 1023, 1279, 5119]
    for tokens in range(0, 40000, 7):
        wide = room.wide(tokens)
        assert tokens <= wide <= max(1.25 * tokens, tokens + 256) and (wide + 1) % room.LEAST == 0
        assert room.wide(wide) == wide


@pytest.mark.parametrize(
    "options",
    [
        {"keep_softmax": "1"},
        {"attn": "softmax"},
        {"keep_softmax": "1.0", "window": 4},
        {"model": "llama-gqa", "keep_softmax": "1"},
    ],
)
def test_steps_whose_keys_grow_are_launched(
    options: dict[str, Any], imitation: Imitation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LEAST", 8)
    step = stepped(**options)
    session, plain = Session(step), Session(step)
    plain.__dict__["_recorded"] = None
    short = [[9, 8, 7], [4, 3, 2] if step.uniform_positions else [4]]
    for prompts in (PROMPTS, short, PROMPTS):  # shorter ones find what longer ones have left
        for new in (20, 3):
            wanted, got = (generate(s, prompts, new, chunk=3) for s in (plain, session))
            assert got.tokens == wanted.tokens
            torch.testing.assert_close(got.state.states, wanted.state.states)
    assert session._recorded is not None
    assert len(session._recorded.recordings) == imitation.recorded >= 3 and imitation.launched >= 30


def test_what_an_earlier_step_left_in_a_recording_is_gone(
    imitation: Imitation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked keys get weight 0, and 0 · NaN is NaN: another sequence's broken values must not be there at all."""
    session, plain = Session(step := stepped(keep_softmax="1")), Session(step)
    plain.__dict__["_recorded"] = None
    generate(session, PROMPTS, 8)
    one = torch.ones(2, 1, dtype=torch.int64)
    state = generate(plain, PROMPTS, 2).state
    args = (one, state.lengths[:, None], one > 0)
    broken = [value * torch.nan if value.is_floating_point() else value for value in state.states]
    launched = imitation.launched
    assert session.step(*args, broken)[0].isnan().all()
    short = generate(plain, [row[:3] for row in PROMPTS], 1).state
    args = (one, short.lengths[:, None], one > 0)
    torch.testing.assert_close(session.step(*args, short.states), plain.step(*args, short.states))
    assert imitation.launched == launched + 2


def growing_step(inputs: list[Tensor]) -> list[Tensor]:
    """Tokens, positions, mask, keys [1, n, 2], and which of them are real [1, n] → their sum, and one more of each."""
    tokens, _, _, keys, real = inputs
    keys, real = torch.cat([keys, tokens[..., None].expand(1, 1, 2)], 1), torch.cat([real, tokens > 0], 1)
    return [(keys * real[:, -keys.shape[1] :, None]).sum(1, keepdim=True), keys, real]


def growing_inputs(keys: int, mask: int) -> list[Tensor]:
    return [*given(1), torch.rand(1, keys, 2) + 1, torch.ones(1, mask, dtype=torch.bool)]


def test_caches_of_unequal_lengths_are_run() -> None:
    imitation = Imitation()
    steps = recorded.Recorded(growing_step, CPU, record=imitation, growing=room.Room({3: 1, 4: 1}))
    for keys in range(4, 12):
        steps(growing_inputs(keys, keys))
    assert imitation.recorded == 1
    for keys, mask in ((5, 6), (6, 9), (7, 7)):  # a mask of more columns has its last ones read
        inputs = growing_inputs(keys, mask)
        torch.testing.assert_close(steps(inputs), growing_step(inputs))
    with pytest.raises(RuntimeError, match="must match"):
        steps(growing_inputs(6, 5))


def test_a_step_to_which_room_makes_a_difference_is_not_recorded() -> None:
    def counts(inputs: list[Tensor]) -> list[Tensor]:
        logits, *states = growing_step(inputs)
        return [logits / states[0].shape[1], *states]

    steps = recorded.Recorded(counts, CPU, record=Imitation(), growing=room.Room({3: 1, 4: 1}))
    steps(growing_inputs(4, 4)), steps(growing_inputs(5, 5))
    with pytest.warns(UserWarning, match="they gave something else with room for more tokens"):
        steps(growing_inputs(6, 6))
    assert steps.off


def test_rooms_that_come_and_go_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 2)
    imitation = Imitation()
    steps = recorded.Recorded(growing_step, CPU, record=imitation, growing=room.Room({3: 1, 4: 1}))
    for _ in range(2 * recorded.OFTEN):
        for keys in (4, 300, 600):
            inputs = growing_inputs(keys, keys)
            torch.testing.assert_close(steps(inputs), growing_step(inputs))
    assert imitation.recorded <= 6, "each time that one comes again it would be recorded, and another would go"


def test_what_there_is_no_memory_for_is_run() -> None:
    imitation, full = Imitation(), [True]

    def record(*args: Any) -> Any:
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return imitation(*args)

    steps = recorded.Recorded(growing_step, CPU, record=record, growing=room.Room({3: 1, 4: 1}))
    with warnings.catch_warnings(action="error"):
        for keys in (4, 5, 6, 7, 300, 301, 302, 303):
            inputs = growing_inputs(keys, keys)
            torch.testing.assert_close(steps(inputs), growing_step(inputs))
            full[0] = keys < 7
    assert imitation.recorded == 1 and not steps.off


def test_large_states_are_run(imitation: Imitation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LEAST", 8)
    step = stepped(keep_softmax="1")
    session = Session(step)
    size = sum(value.nbytes for value in generate(session, PROMPTS, 20).state.states[-3:])
    before = imitation.recorded
    assert before >= 2 and session._recorded is not None
    monkeypatch.setattr(room, "LARGEST", size // 4)
    steps = imitation.launched
    generate(Session(step), PROMPTS, 20)
    assert imitation.recorded == before and imitation.launched == steps, "all prompts are larger than that"
    monkeypatch.setattr(room, "LARGEST", 2 * size)
    kept = Session(step)
    generate(kept, PROMPTS, 40)
    assert (kept._recorded is not None and kept._recorded._bytes() <= 2 * size) or len(kept._recorded.recordings) == 1


def test_a_session_of_another_kind_isnt_recorded(windowed: StepProgram, imitation: Imitation) -> None:
    class Own(Session):
        pass

    assert Own(windowed)._recorded is None and Session(windowed)._recorded is not None


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"window": 4}, {"keep_softmax": "1"}, {"keep_softmax": "1.0", "window": 4}])
def test_on_a_gpu(options: dict[str, Any]) -> None:
    step = stepped(device="cuda", **options)
    session, plain = Session(step), Session(step)
    plain.__dict__["_recorded"] = None
    with warnings.catch_warnings(action="error"):
        wanted, got = (generate(s, PROMPTS, 24, chunk=3) for s in (plain, session))
    assert got.tokens == wanted.tokens
    assert session._recorded is not None and session._recorded.recordings
    torch.testing.assert_close(got.state.states, wanted.state.states)
