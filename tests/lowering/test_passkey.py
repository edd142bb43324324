"""Passkey prompts have exactly the length asked for, and an answer counts only where the number is whole."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_llama
import torch
from torch import Tensor

from lincompile.lowering.evaluation.agreement import Writing, compare, distinct
from lincompile.lowering.evaluation.passkey import (
    ANSWER,
    INTRODUCTION,
    NEEDLE,
    QUESTION,
    Passkey,
    PasskeyResult,
    Prompts,
    retrieve,
    same_key,
    spaced,
)
from lincompile.lowering.evaluation.subject import Subject
from lincompile.lowering.generate import Session
from lincompile.lowering.text import needles_of
from lincompile.lowering.tokenizer import TextCodec
from lincompile.passes.errors import LincompileError
from lincompile.passes.stateful import StateSpec

pytest.importorskip("transformers")
HAY = "Nothing to see here, and here neither. " * 7


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder: Path = tiny_llama.save(tmp_path_factory.mktemp("codec"))
    return TextCodec(folder)


class Finder:
    """A session that reads the whole text and finds the key: what a perfect model would answer."""

    vocab_size = tiny_llama.END + 1
    uniform_positions = False

    def __init__(self, codec: TextCodec, max_positions: int | None = None) -> None:
        self.codec, self.max_positions = codec, max_positions
        self.states = [StateSpec("text", "", "recurrent", (4096,), torch.int64)]
        self.lengths: list[int] = []

    def initial_states(self, batch: int) -> list[Tensor]:
        return [torch.zeros(batch, 4096, dtype=torch.int64)]

    def step(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        seen = states[0].clone()
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for row in range(len(tokens)):
            seen[row, positions[row]] = tokens[row]
            end = int(positions[row, -1]) + 1
            self.lengths.append(end)
            text = self.codec.decode(seen[row, :end].tolist())
            key = text.split("The pass key is ")[1].split(".")[0] if "quiz" in text and "Remember" in text else "?"
            asked = text.rfind("What is the pass key? The pass key is")
            wanted = f" {key}."
            written = len(text) - asked - len("What is the pass key? The pass key is") if asked >= 0 else 0
            following = self.codec.encode(wanted[written : written + 1] or ".", special=False)[0]
            logits[row, -1, following] = 1
        return logits, [seen]


def test_prompts_are_exact(codec: TextCodec) -> None:
    prompts = Prompts(codec, HAY)
    for length in (prompts.shortest(), 400, 1201):
        for depth in (0.0, 0.5, 1.0):
            ids, key = prompts.build(length, depth, random.Random(f"{length}/{depth}"))
            text = codec.decode(ids)
            assert len(ids) == length and len(key) == 5
            assert text.count(f"The pass key is {key}. Remember it. {key} is the pass key.") == 1
            assert text.startswith("There is an important info") and text.endswith("The pass key is")
            hay = len(text) - len(INTRODUCTION + NEEDLE + QUESTION)
            place = (text.index(key) - len(INTRODUCTION + NEEDLE.split("{")[0])) / max(1, hay)
            assert length < 1201 or abs(place - depth) < 0.05
    again, _ = prompts.build(400, 0.5, random.Random("400/0.5"))
    assert again == prompts.build(400, 0.5, random.Random("400/0.5"))[0]
    with pytest.raises(LincompileError, match=r"a prompt of 100 tokens has no room: introduction, key and question"):
        prompts.build(100, 0.5, random.Random(0))


def test_training_examples_are_prompts_with_keys_of_their_own(codec: TextCodec) -> None:
    """Opening, haystack with the key in it, question and answer; only the answer has to be found."""
    made = Prompts(codec, HAY).needles(seed=3, count=40)
    assert len(made) == len(made.asked) == 40 and made.most == 1
    keys = set()
    for index in range(40):
        assert codec.decode(made.opening) == INTRODUCTION
        asked = made.answers[index][made.to_find(index)].tolist()
        key = codec.decode(asked).strip()
        assert same_key(key, key) and len(key) == 5
        assert codec.decode(made.facts[index].tolist()) == NEEDLE.format(key=key)
        assert codec.decode(made.answers[index].tolist()) == QUESTION + ANSWER.format(key=key)
        keys.add(key)
    assert len(keys) > 35
    again, other = (Prompts(codec, HAY).needles(seed, count=40) for seed in (3, 4))
    assert again.fingerprint() == made.fingerprint() != other.fingerprint()


def test_needles_of_either_kind(codec: TextCodec) -> None:
    ids = torch.arange(3, 203)
    spans = needles_of(None, "facts", ids, seed=1)
    assert spans.most == 0 and spans.asked[0] == 8
    with pytest.raises(LincompileError, match="came without a tokenizer"):
        needles_of(None, "passkeys", ids, seed=1)


def test_a_model_that_remembers_hits_every_key(codec: TextCodec) -> None:
    subject = Subject("finder", Finder(codec), codec, (), None)
    seen: list[tuple[int, int]] = []
    partial: list[int] = []
    options = Passkey((400, 500), spaced(2), trials=2)

    def keep(result: PasskeyResult) -> None:
        partial.append(len(result.cells))

    result = retrieve(subject, HAY, options, on_cell=keep, on_token=lambda done, total: seen.append((done, total)))
    assert result.accuracy() == result.accuracy(500) == 1 and partial == [1, 2, 3, 4]
    assert seen[-1] == (1800, 1800) and seen == sorted(seen)
    record = result.record()
    assert record["by_length"] == {"400": 1.0, "500": 1.0} and record["cells"][0]["answers"] == []
    # A cell doesn't depend on what runs beside it.
    one = Finder(codec)
    alone = retrieve(Subject("finder", one, codec, (), None), HAY, Passkey((500,), (1.0,), trials=2))
    assert alone.cells[0] == result.cells[-1] and max(one.lengths) <= 500 + 7


@pytest.mark.parametrize(
    ("text", "hit"), [(" 12345.", True), ("12345", True), ("\n 12345 is", True), (" 123456", False), (" 1234", False),
                      (" the key 12345", False), ("", False)]
)  # fmt: skip
def test_only_the_whole_number_counts(text: str, hit: bool) -> None:
    assert same_key(text, "12345") == hit


def test_positions_bound_the_prompts_and_their_answers(codec: TextCodec) -> None:
    subject = Subject("finder", Finder(codec, max_positions=406), codec, (), None)
    with pytest.raises(LincompileError, match="prompts of 400 tokens and 7 more for the answer exceed the 406"):
        retrieve(subject, HAY, Passkey((400,)))
    retrieve(subject, HAY, Passkey((399,), (0.5,), trials=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "lengths of at least one token"),
        ({"lengths": (0,)}, "lengths of at least one token"),
        ({"lengths": (9,), "depths": ()}, "depths from 0"),
        ({"lengths": (9,), "depths": (1.5,)}, "depths from 0"),
        ({"lengths": (9,), "trials": 0}, "at least 1 trial"),
        ({"lengths": (9,), "digits": 0}, "1 to 18 digits"),
    ],
)
def test_nothing_to_try(options: dict[str, object], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        Passkey(**options)  # type: ignore[arg-type]


def test_a_haystack_or_a_tokenizer_without_content(codec: TextCodec, tmp_path: Path) -> None:
    from .conftest import write_word_tokenizer

    with pytest.raises(LincompileError, match="the haystack is empty"):
        Prompts(codec, " \n ")
    write_word_tokenizer(tmp_path)
    with pytest.raises(LincompileError, match="the tokenizer has no digits"):
        Prompts(TextCodec(tmp_path), "w4 w5")


def test_agreement_of_a_model_with_itself_and_with_another(toy: SimpleNamespace) -> None:
    teacher = Subject("teacher", Session(toy.step), None, (), toy.step)
    ids = torch.randint(2, 40, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    options = Writing(prompts=5, prompt_tokens=8, new_tokens=12, batch=2)
    done: list[tuple[int, int]] = []
    itself = compare(teacher, teacher, ids, options, lambda a, b: done.append((a, b))).record()
    assert done == [(2, 5), (4, 5), (5, 5)]
    assert itself["agreement"] == itself["same_whole"] == 1 and itself["same_tokens"] == 12
    assert itself["nll"]["student"] == itself["nll"]["teacher"]

    class Shifted(Session):
        """Chooses the next token id after the toy's."""

        def advance(
            self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
        ) -> tuple[Tensor, list[Tensor]]:
            logits, new = super().advance(tokens, positions, mask, states)
            return logits.roll(1, -1), new

        step_last = Session.step

    other = Subject("other", Shifted(toy.step), None, (), toy.step)
    record = compare(other, teacher, ids, options).record()
    assert record["agreement"] == record["same_tokens"] == record["same_whole"] == 0
    assert record["nll"]["student"] > record["nll"]["teacher"]


def test_distinct_counts_what_is_repeated() -> None:
    assert distinct([1, 2, 3, 4, 5, 6]) == 1
    assert distinct([1, 1, 1, 1, 1, 1, 1]) == 0.25
    assert distinct([1, 2, 1, 2, 1, 2, 1], n=2) == pytest.approx(2 / 6)


def test_what_cannot_be_compared(toy: SimpleNamespace) -> None:
    subject = Subject("toy", Session(toy.step), None, (), toy.step)
    wide = Subject("wide", Session(toy.step, vocab_size=99), None, (), toy.step)
    cases = [
        (wide, subject, Writing(), [5] * 80, "wide knows 99 tokens and toy 40"),
        (subject, subject, Writing(), [5] * 80, "128 tokens exceed the 64 positions"),
        (
            subject,
            subject,
            Writing(prompt_tokens=8, new_tokens=8),
            [5] * 7,
            "the text has 7 tokens, less than a prompt",
        ),
    ]
    for student, teacher, options, ids, message in cases:
        with pytest.raises(LincompileError, match=message):
            compare(student, teacher, ids, options)
    for bad in ({"prompts": 0}, {"prompt_tokens": 0}, {"new_tokens": 3}):
        with pytest.raises(LincompileError, match="comparing what models write"):
            Writing(**bad)
