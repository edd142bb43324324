"""Windows of documents: never mixed, never padded, in an order that a seed and a step give; echoes; retrieval."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from distil_models import LENGTH, windows
from torch import Tensor

from lincompile.passes.distil.data import Ahead, TokenWindows
from lincompile.passes.distil.echo import NEAREST, WithEchoes
from lincompile.passes.distil.retrieval import Needles, WithRetrieval
from lincompile.passes.errors import LincompileError


def documents(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids that name their document in the thousands and count their place in it, and the documents' starts."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    owner = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    return owner * 1000 + torch.arange(int(sizes.sum())) - starts[owner], starts


def mixed() -> TokenWindows:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(5, 500, (120,), generator=generator).tolist()
    ids, starts = documents(lengths)
    return TokenWindows(ids, 128, 4, documents=starts)


def test_no_window_holds_tokens_of_two_documents() -> None:
    data = mixed()
    shapes = set()
    seen: set[int] = set()
    for index in range(data.steps):
        tokens = data.step(index)
        shapes.add(tuple(tokens.shape))
        assert torch.equal(tokens - tokens[:, :1], torch.arange(tokens.shape[1]).expand_as(tokens)), (
            "one stretch of one"
        )
        seen.update(tokens.flatten().tolist())
    assert shapes == {(4, 128), (8, 64)}, "every step has the same number of tokens, in few shapes"
    held_out = set(torch.cat([data._tokens(w.held_out, w.size).flatten() for w in data.sizes]).tolist())
    assert not seen & held_out
    documents_unused, tokens_unused = data.unused
    lengths = data._lengths
    assert (documents_unused, tokens_unused) == (int((lengths < 64).sum()), int(lengths[lengths < 64].sum()))
    assert len(seen) > 0.85 * (data.ids.numel() - tokens_unused - len(held_out))
    said = data.summary()
    assert f"{documents_unused} shorter documents ({tokens_unused:,} tokens) are left out" in said
    assert "of 128 tokens and" in said


def test_all_of_a_document_is_covered_by_windows_that_end_with_it() -> None:
    ids, starts = documents([100, 100, 100, 70])
    data = TokenWindows(ids, 64, 1, documents=starts)
    (only,) = data.sizes
    assert only.training.tolist() == [0, 36, 100, 136, 200, 236], "the window at 300 would reach into the last one"
    assert only.held_out.tolist() == [306]
    assert torch.equal(data.measure(4), ids[None, 306:370])


def test_windows_to_train_on_share_no_tokens_with_held_out_ones() -> None:
    ids, starts = documents([100, 70])
    data = TokenWindows(ids, 64, 1, documents=starts)
    assert data.sizes[0].training.tolist() == [0, 36], "the window at 100 would reach into the one at 106"


def test_documents_shorter_than_the_length_have_windows_of_their_own() -> None:
    ids, starts = documents([40] * 30)
    data = TokenWindows(ids, 1024, 2, documents=starts)
    assert [(w.size, w.rows) for w in data.sizes] == [(32, 56)], "never more rows than there are windows"
    assert data.measure(2).shape == (2, 32)


def test_batches_repeat_by_seed_and_step() -> None:
    data, same = mixed(), mixed()
    far = 3 * data.steps + 2
    assert torch.equal(data.step(far), same.step(far))
    assert not torch.equal(data.step(0), data.step(data.steps)), "shuffled anew each epoch"
    ids, starts = documents([50] * 40)
    orders = [TokenWindows(ids, 48, 2, seed=seed, documents=starts).step(0) for seed in (0, 1)]
    assert not torch.equal(*orders)
    prints = [TokenWindows(ids, 48, 2, documents=d).fingerprint() for d in (None, starts)]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("starts", [[1, 20], [0, 30, 20], [0, 5000], []])
def test_starts_that_are_none_are_refused(starts: list[int]) -> None:
    with pytest.raises(LincompileError, match="starts of the documents must ascend, from 0"):
        windows(documents=torch.tensor(starts, dtype=torch.int64))


def test_documents_too_short_for_any_window_are_refused() -> None:
    ids, starts = documents([12] * 200)
    with pytest.raises(LincompileError, match=r"in one document \(the longest of 200 has 12\): give more text"):
        TokenWindows(ids, 64, 2, documents=starts)


# ---- retrieval


def needles() -> Needles:
    facts = [torch.tensor([900 + i, 950 + i]) for i in range(20)]
    return Needles(facts, [torch.tensor([900 + i, 950 + i, 999]) for i in range(20)])


def test_retrieval_examples_hold_their_facts_and_ask_for_each_at_the_end() -> None:
    base = TokenWindows(torch.arange(800).repeat(10), 512, 4)
    data = WithRetrieval(base, needles(), share=0.5, seed=1)
    plain = looped = 0
    facts = [0, 0, 0]
    for index in range(12):
        for window, original in zip(data.step(index), base.step(index), strict=True):
            assert len(window) == 512
            if torch.equal(window, original):
                plain += 1
                continue
            count = int((window == 999).sum())
            facts[count] += 1
            asked, rest = window[-3 * count :].view(count, 3), window[: -3 * count]
            assert (asked[:, 2] == 999).all()
            for cue, answer in asked[:, :2].tolist():
                (place,) = (rest == cue).nonzero().flatten().tolist()
                assert rest[place + 1] == answer == cue + 50
            filler = rest[rest < 900]
            assert len(filler) == 512 - 5 * count
            if torch.equal(filler, original[: len(filler)]):
                continue
            looped += 1
            period = int((filler[1:] == filler[0]).nonzero()[0]) + 1
            assert 32 <= period < 256 and torch.equal(filler[period:], filler[:-period])
            assert torch.isin(filler, original).all()
    assert plain > 15 and 5 < looped < sum(facts) - 5
    assert not facts[0] and facts[1] > 5 and facts[2] > 5
    assert torch.equal(data.step(3), data.step(3)) and torch.equal(data.measure(2), base.measure(2))
    other: list[Any] = [WithRetrieval(base, needles(), share, seed) for share, seed in ((0.5, 2), (0.4, 1))]
    assert all(data.fingerprint() != o.fingerprint() for o in [base, *other])


def test_windows_too_short_for_facts_stay_text() -> None:
    base = TokenWindows(torch.arange(100), 8, 2)
    data = WithRetrieval(base, needles(), share=1.0)
    assert torch.equal(data.step(0), base.step(0)) and not data.made(0).asked.any()


def test_what_has_to_be_found_is_the_end_of_each_answer() -> None:
    base = TokenWindows(torch.arange(800).repeat(10), 512, 4)
    whole = WithRetrieval(base, needles(), share=1.0)
    some = WithRetrieval(base, replace(needles(), asked=[1] * 20), share=1.0)
    for index in range(3):
        tokens, asked, repeats = whole.made(index)
        assert torch.equal(tokens, whole.step(index)) and torch.equal(tokens, some.step(index))
        ends = tokens == 999
        assert torch.equal(some.made(index).asked, ends) and ends.any(1).all() and (repeats == 1).all()
        assert asked.sum() == 3 * ends.sum() and torch.equal(asked.flip(1).cummin(1).values, asked.flip(1))


def test_stretched_examples_repeat_what_stands_between_facts() -> None:
    """One number of copies for an example's text, evenly in log-space; facts, answers, opening and plain text stay."""
    base = TokenWindows(torch.arange(800).repeat(10), 512, 4)
    made = replace(needles(), opening=[990, 991], parts=(2,))
    plain, data = (WithRetrieval(base, made, 0.8, stretch=stretch) for stretch in (1, 32))
    drawn: list[int] = []
    for index in range(60):
        tokens, asked, repeats = data.made(index)
        assert torch.equal(tokens, data.step(index)) and not (repeats[asked] != 1).any()
        for window, times, original in zip(tokens, repeats, base.step(index), strict=True):
            if torch.equal(window, original):
                assert (times == 1).all()
                continue
            for piece, copies in zip(window.chunk(2), times.chunk(2), strict=True):
                text = piece < 900
                drawn.append(int(copies[text][0]))
                assert (copies[text] == drawn[-1]).all() and (copies[~text] == 1).all()
    counts = torch.tensor(drawn).float()
    assert len(drawn) > 300 and counts.min() == 1 and 28 <= counts.max() <= 32
    assert float(counts.log2().mean()) == pytest.approx(2.5, abs=0.3)
    assert plain.fingerprint() | {"stretch": 32} == data.fingerprint() != plain.fingerprint()
    assert torch.equal(plain.step(0), WithRetrieval(base, made, 0.8).step(0))
    assert not torch.equal(data.made(0).repeats[0], data.made(1).repeats[0])


@pytest.mark.parametrize("stretch", [0.5, 0.0, -3.0, math.inf, math.nan, 2.0**21])
def test_a_stretch_that_is_none(stretch: float) -> None:
    base = TokenWindows(torch.arange(800).repeat(10), 512, 4)
    with pytest.raises(LincompileError, match=r"--stretch .*: text between facts counts 1 to 1,048,576"):
        WithRetrieval(base, needles(), 0.5, stretch=stretch)
    with pytest.raises(LincompileError, match="--stretch 4 is about retrieval examples: add --retrieval SHARE"):
        WithRetrieval(base, needles(), 0.0, stretch=4)


def test_examples_of_other_needles_are_another_run() -> None:
    """A checkpoint is resumed with what it was trained on; the sum of the facts alone says too little."""
    same = needles()
    others = (
        replace(same, facts=[fact.flip(0) for fact in same.facts]),
        replace(same, answers=[answer[1:] for answer in same.answers]),
        replace(same, asked=[1] * 20),
        replace(same, opening=[990]),
        replace(same, opening=[991]),
        replace(same, most=1),
        replace(same, parts=(1, 2)),
    )
    prints = [str(each.fingerprint()) for each in (same, *others)]
    assert str(needles().fingerprint()) == prints[0] and len({*prints}) == len(prints)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_window_of_several_examples(parts: int) -> None:
    """Each begins with the opening, holds its own facts, and ends in its answers."""
    base = TokenWindows(torch.arange(800).repeat(10), 510, 4)
    made = replace(needles(), opening=[990, 991], most=1, parts=(parts,), asked=[1] * 20)
    for window in WithRetrieval(base, made, share=1.0).step(0):
        assert len(window) == 510
        sizes = [len(piece) for piece in torch.tensor_split(window, parts)]
        for piece in torch.split(window, sizes):
            assert piece[:2].tolist() == [990, 991] and int(piece[-1]) == 999
            cue, answer = piece[-3:-1].tolist()
            (place,) = (piece[:-3] == cue).nonzero().flatten().tolist()
            assert piece[place + 1] == answer == cue + 50


def test_the_next_batch_is_made_ahead_and_errors_come_when_asked_for() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        if index == 3:
            raise LincompileError("no third batch")
        return 10 * index

    with Ahead(make) as ahead:
        assert [ahead(0), ahead(1), ahead(2)] == [0, 10, 20]
        assert ahead(0) == 0, "a resumed run begins elsewhere"
        assert ahead(2) == 20
        with pytest.raises(LincompileError, match="no third batch"):
            ahead(3)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
    assert made[:3] == [0, 1, 2]


def test_facts_from_token_ids_alone() -> None:
    ids = torch.arange(500)
    made = Needles.from_spans(ids, seed=4, count=5)
    assert len(made.facts) == 5 and all(torch.equal(a, b) for a, b in zip(made.facts, made.answers, strict=True))
    assert all(torch.equal(fact.diff().ne(1), torch.arange(15) == 7) or fact.diff().eq(1).all() for fact in made.facts)
    assert torch.equal(Needles.from_spans(ids, 4, 5).facts[2], made.facts[2])
    with pytest.raises(LincompileError, match="too few to make retrieval examples"):
        Needles.from_spans(torch.arange(LENGTH), 0)


def test_windows_that_ranks_share_have_sizes_that_divide() -> None:
    """Windows of 80 come in 40 and 20 too: four ranks can share 20 tokens, eight can't."""
    starts = torch.arange(0, 4000, 20)
    ids = torch.arange(4000)
    whole = [windows.size for windows in TokenWindows(ids, 80, 1, documents=starts).sizes]
    assert whole == [20]
    assert [w.size for w in TokenWindows(ids, 80, 1, documents=starts, multiple=4).sizes] == [20]
    with pytest.raises(LincompileError, match="less than two windows"):
        TokenWindows(ids, 80, 1, documents=starts, multiple=8)


# ---- echoes


def test_echoes_repeat_spans_of_the_window_itself() -> None:
    base = TokenWindows(torch.arange(40_000), 1024, 4)
    data = WithEchoes(base, share=0.5, seed=1)
    plain = made = 0
    distances: list[int] = []
    for index in range(8):
        for window, original in zip(data.step(index), base.step(index), strict=True):
            if torch.equal(window, original):
                plain += 1
                continue
            made += 1
            first: dict[int, int] = {}
            own: list[int] = []
            before = -1
            repeated = 0
            for place, token in enumerate(window.tolist()):
                if token in first:
                    repeated += 1
                    if token != before + 1:  # an echo begins
                        distances.append(place - first[token])
                else:
                    first[token] = place
                    own.append(token)
                before = token
            assert own == original[: len(own)].tolist()  # without its echoes it is the window, from its beginning
            assert 10 < repeated < 512
    assert plain > 5 and made > 5
    assert min(distances) >= NEAREST and max(distances) > 500
    near = sum(NEAREST <= d < 64 for d in distances) / len(distances)
    assert 0.15 < near < 0.6  # as many in each doubling of the distance, rather than in each token of it
    assert torch.equal(data.step(3), data.step(3)) and torch.equal(data.measure(2), base.measure(2))
    assert data.length == 1024
    others: list[Any] = [WithEchoes(base, share, seed) for share, seed in ((0.5, 2), (0.4, 1))]
    assert all(data.fingerprint() != other.fingerprint() for other in [base, *others])


@pytest.mark.parametrize("length", [8, 16, 17, 96, 97])
def test_short_windows_keep_their_length_and_their_tokens(length: int) -> None:
    base = TokenWindows(torch.arange(1000), length, 2)
    for index in range(20):
        window, original = WithEchoes(base, share=1.0).step(index)[0], base.step(index)[0]
        assert len(window) == length and set(window.tolist()) <= set(original.tolist())


def test_no_share_leaves_windows_alone_and_a_wrong_one_is_refused() -> None:
    base = TokenWindows(torch.arange(4000), 256, 2)
    assert torch.equal(WithEchoes(base, share=0.0).step(1), base.step(1))
    with pytest.raises(LincompileError, match=r"--echoes 1\.5: the share of windows that repeat spans is from 0 to 1"):
        WithEchoes(base, share=1.5)
