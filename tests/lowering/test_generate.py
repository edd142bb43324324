"""Generation: chunks, batches, sampling, trimming, and everything a prompt can get wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lincompile.lowering.generate import Sampling, Session, choose, generate, left_pad, prefill
from lincompile.passes.errors import LincompileError

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 9], [30, 3, 11, 20]]


@pytest.fixture(scope="module")
def session(toy: SimpleNamespace) -> Session:
    return Session(toy.step)


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_chunked_prefill_equals_one_shot(session: Session, chunk: int) -> None:
    tokens, mask = left_pad(PROMPTS)
    whole = prefill(session, tokens, mask, chunk=1000)
    parts = prefill(session, tokens, mask, chunk=chunk)
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert parts.lengths.tolist() == [9, 2, 4]
    for a, b in zip(parts.states, whole.states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_decode_equals_recomputing_the_prefix(session: Session) -> None:
    prompt = PROMPTS[0]
    new = generate(session, [prompt], 8).tokens[0]
    for count in range(8):
        assert generate(session, [prompt + new[:count]], 1).tokens[0] == [new[count]]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 0.9, "top_k": 5}])
def test_padded_batch_equals_single_runs(session: Session, options: dict[str, float]) -> None:
    together = generate(session, PROMPTS, 10, **options)
    for row, prompt in enumerate(PROMPTS):
        seed = int(options.get("seed", 0)) + row
        alone = generate(session, [prompt], 10, **{**options, "seed": seed})
        assert together.tokens[row] == alone.tokens[0]
        torch.testing.assert_close(together.state.logits[row], alone.state.logits[0], atol=1e-5, rtol=1e-5)


def test_a_finished_row_leaves_the_others_alone(session: Session) -> None:
    free = generate(session, PROMPTS, 10)
    eos = free.tokens[0][2]
    stopped = generate(session, PROMPTS, 10, eos_ids=[eos])
    assert stopped.tokens[0][-1] == eos
    assert stopped.finish[0] == "eos"
    for row, tokens in enumerate(stopped.tokens):
        assert tokens == free.tokens[row][: len(tokens)]
        assert (tokens[-1] == eos) == (stopped.finish[row] == "eos")


def test_sliding_caches_are_trimmed_without_changing_the_result(toy: SimpleNamespace, session: Session) -> None:
    untrimmed = Session(replace(toy.step, windows={}))
    a, b = generate(session, PROMPTS, 12, chunk=3), generate(untrimmed, PROMPTS, 12, chunk=3)
    assert a.tokens == b.tokens
    kept = {
        spec.name: state.shape[2] for spec, state in zip(toy.states, a.state.states, strict=True) if state.dim() == 4
    }
    assert kept["2.key"] == kept["2.value"] == 4, "the window"
    assert kept["1.key"] == 9 + 11
    assert b.state.states[5].shape[2] == 9 + 11


def test_state_bytes_counts_constant_and_growing_states(toy: SimpleNamespace, session: Session) -> None:
    result = generate(session, [PROMPTS[0]], 5)
    held = sum(state.numel() * state.element_size() for state in result.state.states)
    assert toy.step.state_bytes(1, 9 + 4) == held


def test_continuing_after_a_prefill(session: Session) -> None:
    tokens, mask = left_pad([PROMPTS[0]])
    first = prefill(session, tokens[:, :4], mask[:, :4])
    both = prefill(session, tokens[:, 4:], mask[:, 4:], after=first)
    torch.testing.assert_close(both.logits, prefill(session, tokens, mask).logits, atol=1e-5, rtol=1e-5)


def test_models_that_count_positions_themselves_take_no_padding(toy: SimpleNamespace) -> None:
    session = Session(replace(toy.step, uniform_positions=True))
    with pytest.raises(LincompileError, match="different lengths can't share a batch"):
        generate(session, PROMPTS, 3)
    assert len(generate(session, [PROMPTS[0], PROMPTS[0]], 3).tokens) == 2


@pytest.mark.parametrize("more", [[[3], [4]], [[], []]])
def test_rows_of_different_lengths_are_not_continued_where_the_model_counts_positions(
    toy: SimpleNamespace, more: list[list[int]]
) -> None:
    session = Session(replace(toy.step, uniform_positions=True))
    first = generate(session, [PROMPTS[0], PROMPTS[0]], 3)
    assert len(generate(session, more, 3, after=first.state).tokens) == 2
    apart = replace(first.state, lengths=first.state.lengths - torch.tensor([1, 0]))
    with pytest.raises(
        LincompileError, match=r"counts positions itself, and the rows to continue are 10, 11 tokens long"
    ):
        generate(session, more, 3, after=apart)


def test_streaming_reports_every_token_in_order(session: Session) -> None:
    seen: list[tuple[int, int]] = []
    result = generate(session, PROMPTS, 4, stream=lambda row, token: seen.append((row, token)))
    for row, tokens in enumerate(result.tokens):
        assert [token for which, token in seen if which == row] == tokens


def test_no_new_tokens_is_allowed(session: Session) -> None:
    result = generate(session, [[1, 2]], 0)
    assert result.tokens == [[]]
    assert result.state.lengths.tolist() == [2]


def test_generation_stops_at_the_last_position(session: Session) -> None:
    result = generate(session, [list(range(1, 31)) * 2], 100)
    assert result.finish == ["max_positions"]
    # 60 tokens of prompt, 64 positions: 4 tokens can be read after it, so 5 can be chosen.
    assert len(result.tokens[0]) == 5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty"),
        ([[1], []], "prompt 1 of the batch is empty"),
        ([], "no prompt"),
        ([[1] * 65], "65 tokens, the model accepts at most 64"),
        ([[1, 40]], "token id 40 is outside the model's vocabulary"),
        ([[-1]], "token id -1"),
    ],
)
def test_bad_prompts(session: Session, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        generate(session, prompts, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"chunk": -3}, "chunk must be at least 1"),
    ],
)
def test_bad_options(session: Session, options: dict[str, float], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        generate(session, [[1]], **options)


@pytest.mark.parametrize("mask", [[True, True, False], [True, False, True]])
def test_masks_that_are_not_left_padding_are_refused(session: Session, mask: list[bool]) -> None:
    with pytest.raises(LincompileError, match="on the left"):
        prefill(session, torch.tensor([[1, 2, 3]]), torch.tensor([mask]))


def test_sampling_keeps_to_the_allowed_tokens() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0, 2.5]]).expand(400, -1)
    generators = [torch.Generator().manual_seed(i) for i in range(400)]
    assert set(choose(logits, Sampling(1.0, top_k=2), generators).tolist()) == {1, 4}
    # probabilities 0.447, 0.271, 0.165, …: 0.6 is crossed by the second
    assert set(choose(logits, Sampling(1.0, top_p=0.6), generators).tolist()) == {1, 4}
    assert set(choose(logits, Sampling(1.0, top_p=1e-6), generators).tolist()) == {1}
    assert set(choose(logits, Sampling(0.0), generators).tolist()) == {1}


def test_sampling_follows_the_distribution() -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    drawn = choose(torch.tensor([[0.2, 0.5, 0.3]]).log().expand(4000, -1), Sampling(1.0), generators)
    shares = drawn.bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), atol=0.03, rtol=0)


def test_logits_that_are_not_finite_stop_generation() -> None:
    with pytest.raises(LincompileError, match="not finite"):
        choose(torch.tensor([[0.0, float("nan")]]), Sampling(), [])
