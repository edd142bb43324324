"""Passkey retrieval: a number hidden in a long text must be repeated at its end, at many lengths and depths.

The prompt is the one of Mohtashami and Jaggi (arXiv 2305.16300), which LAWCAT is measured by too: an introduction, the
haystack with the key somewhere in it, and the question. Each prompt has exactly the number of tokens asked for.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...passes.distil.retrieval import Needles
from ...passes.errors import LincompileError
from ..generate import NO_STEP_FORM, generate
from ..tokenizer import TextCodec
from .subject import Subject

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER = " {key}"


@dataclass(frozen=True)
class Passkey:
    """What to try.

    Args:
        lengths: tokens per prompt.
        depths: where the key stands: 0 = before the haystack, 1 = after it.
        trials: keys (and starting places in the haystack) per length and depth.
        digits: of a key.
        seed: with length, depth and trial, what a prompt depends on: a cell is the same whatever runs beside it.

    Raises:
        LincompileError: nothing to try, or a value out of range.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 3
    digits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise LincompileError("passkey retrieval needs lengths of at least one token, such as 1K,2K,4K")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise LincompileError("passkey retrieval needs depths from 0 (at the beginning) to 1 (at the end)")
        if self.trials < 1:
            raise LincompileError(f"passkey retrieval needs at least 1 trial per cell, not {self.trials}")
        if not 1 <= self.digits <= 18:
            raise LincompileError(f"a pass key has 1 to 18 digits, not {self.digits}")


def spaced(count: int) -> tuple[float, ...]:
    """``count`` depths, evenly spaced from 0 to 1 (one: in the middle)."""
    if count < 1:
        raise LincompileError(f"passkey retrieval needs at least 1 depth, not {count}")
    return (0.5,) if count == 1 else tuple(index / (count - 1) for index in range(count))


@dataclass
class Cell:
    """One length and depth: ``hits`` of ``trials`` keys came back whole; ``answers`` are what came instead."""

    length: int
    depth: float
    hits: int = 0
    trials: int = 0
    answers: list[str] = field(default_factory=list)


@dataclass
class PasskeyResult:
    """All cells, lengths outermost, and how long they took."""

    options: Passkey
    cells: list[Cell] = field(default_factory=list)
    seconds: float = 0.0

    def accuracy(self, length: int | None = None) -> float:
        """The share of keys that came back, of one length or of all."""
        cells = [cell for cell in self.cells if length in (None, cell.length)]
        return sum(cell.hits for cell in cells) / max(1, sum(cell.trials for cell in cells))

    def record(self) -> dict[str, Any]:
        """The JSON of ``lincompile eval --passkey``."""
        return {
            "accuracy": self.accuracy(),
            "by_length": {str(length): self.accuracy(length) for length in self.options.lengths},
            **asdict(self.options),
            "cells": [asdict(cell) for cell in self.cells],
            "seconds": round(self.seconds, 3),
        }


class Prompts:
    """Writes prompts of exact lengths, in tokens.

    Args:
        codec: the model's tokenizer.
        haystack: the text that hides the key; where it is shorter than a prompt it is repeated.

    Raises:
        LincompileError: an empty haystack, or a tokenizer that has no digits.
    """

    def __init__(self, codec: TextCodec, haystack: str, digits: int = 5) -> None:
        self.codec, self.digits = codec, digits
        self._hay = codec.encode(haystack.strip(), special=False)
        if not self._hay:
            raise LincompileError("the haystack is empty: give a text to hide the key in")
        plain, whole = codec.encode(INTRODUCTION, special=False), codec.encode(INTRODUCTION)
        added = len(whole) - len(plain)
        self._head = [*whole[:added], *plain] if added > 0 and whole[added:] == plain else plain
        self._tail = codec.encode(QUESTION, special=False)
        highest = "9" * digits
        if highest not in codec.decode(self.answer(highest)):
            raise LincompileError("the tokenizer has no digits, so no pass key can be written")

    def answer(self, key: str) -> list[int]:
        """The tokens that should follow the prompt."""
        return self.codec.encode(ANSWER.format(key=key), special=False)

    def shortest(self) -> int:
        """Tokens of a prompt without haystack, for the longest of a few keys."""
        keys = [str(digit) * self.digits for digit in range(1, 10)]
        return max(len(self._head) + len(self._needle(key)) + len(self._tail) for key in keys)

    def needles(self, seed: int, count: int = 8192) -> Needles:
        """Prompts of this form as retrieval examples to train on, with ``count`` random keys.

        A window is one prompt, two or four: two thirds of the prompts are short ones, in which looking back is learned
        before it is at greater distances. Of an answer only the key itself has to be found.
        """
        draw = random.Random(f"{seed}/training")
        keys = [str(draw.randrange(10 ** (self.digits - 1), 10**self.digits)) for _ in range(count)]
        facts = self.codec.encode_all([NEEDLE.format(key=key) for key in keys], special=False)
        answers = self.codec.encode_all([ANSWER.format(key=key) for key in keys], special=False)
        return Needles(
            [torch.tensor(fact) for fact in facts],
            [torch.tensor([*self._tail, *answer]) for answer in answers],
            [len(answer) for answer in answers],
            self._head,
            most=1,
            parts=(1, 2, 4),
        )

    def _needle(self, key: str) -> list[int]:
        return self.codec.encode(NEEDLE.format(key=key), special=False)

    def build(self, length: int, depth: float, source: random.Random) -> tuple[list[int], str]:
        """A prompt of ``length`` tokens and its key.

        Raises:
            LincompileError: the length leaves no room for introduction, key and question.
        """
        key = str(source.randrange(10 ** (self.digits - 1), 10**self.digits))
        needle = self._needle(key)
        room = length - len(self._head) - len(needle) - len(self._tail)
        if room < 0:
            raise LincompileError(
                f"a prompt of {length} tokens has no room: introduction, key and question take {length - room}"
            )
        start = source.randrange(len(self._hay))
        hay = self._hay[start:] + self._hay[:start]
        hay = (hay * (room // len(hay) + 1))[:room]
        place = round(depth * room)
        return [*self._head, *hay[:place], *needle, *hay[place:], *self._tail], key


def retrieve(
    subject: Subject,
    haystack: str,
    options: Passkey,
    *,
    on_cell: Callable[[PasskeyResult], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> PasskeyResult:
    """Asks for every key, greedily; the trials of a cell run as one batch.

    Args:
        on_cell: called with the result so far after each cell.
        on_token: called with (prompt tokens read, prompt tokens in all), trials of a cell counted once.

    Raises:
        LincompileError: no tokenizer, no step form, or a length that the prompt or the model doesn't allow.
    """
    if not subject.session.states:
        raise LincompileError(f"{subject.name}: {NO_STEP_FORM}")
    prompts = Prompts(subject.tokenizer("passkey retrieval"), haystack, options.digits)
    new = max(len(prompts.answer(str(digit) * options.digits)) for digit in range(1, 10)) + 1
    check_lengths(subject, prompts, options.lengths, new)
    result, began = PasskeyResult(options), time.monotonic()
    total, done = sum(options.lengths) * len(options.depths), 0

    def read(tokens: int, _: int) -> None:
        if on_token:
            on_token(done + tokens, total)

    for length in options.lengths:
        for depth in options.depths:
            sources = [random.Random(f"{options.seed}/{length}/{depth}/{trial}") for trial in range(options.trials)]
            asked = [prompts.build(length, depth, source) for source in sources]
            answered = generate(
                subject.session,
                [ids for ids, _ in asked],
                new,
                chunk=subject.chunk,
                on_prefill=read,
            )
            texts = [prompts.codec.decode(tokens) for tokens in answered.tokens]
            cell = Cell(length, depth, trials=options.trials)
            for text, (_, key) in zip(texts, asked, strict=True):
                if same_key(text, key):
                    cell.hits += 1
                else:
                    cell.answers.append(text)
            result.cells.append(cell)
            result.seconds = time.monotonic() - began
            done += length
            if on_cell:
                on_cell(result)
    return result


def same_key(text: str, key: str) -> bool:
    """Whether an answer begins with exactly this number."""
    match = re.match(r"\s*(\d+)", text)
    return match is not None and match[1] == key


def check_lengths(subject: Subject, prompts: Prompts, lengths: Sequence[int], new: int) -> None:
    """Refuses, before anything runs, lengths too short for the prompt or too long for the model."""
    if min(lengths) < (shortest := prompts.shortest()):
        raise LincompileError(
            f"a prompt of {min(lengths)} tokens has no room: introduction, key and question take {shortest}"
        )
    limit = subject.session.max_positions
    if limit is not None and max(lengths) + new > limit:
        raise LincompileError(
            f"prompts of {max(lengths)} tokens and {new} more for the answer exceed the {limit} positions of "
            f"{subject.name}: give shorter --lengths, or --extrapolate to go beyond what its configuration names"
        )
