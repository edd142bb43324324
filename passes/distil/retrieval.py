"""Synthetic retrieval: facts strewn into a window of training text, and asked for at its end.

The teacher finds them again by attention; asking the student for the teacher's answers at long distances is what
teaches its states and gates to keep them. The facts are made from the training text by a seed, never from tests.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LincompileError
from ..linearization.methods import METHODS, method_class
from ..linearization.stretch import MOST
from .data import Batches

SPAN = 8  # tokens of a cue and of its answer, where facts are made from token ids alone
SPACING = 256  # tokens of a window for each fact, at least
LOOPS = 0.5  # share of the examples whose text is a few sentences over and over
LOOP = (32, 256)  # tokens of such a passage


@dataclass(frozen=True)
class Needles:
    """Facts as token ids ``[n]``: as they stand in the text, and as they are asked for and answered at the end.

    Args:
        asked: of each answer, how many of its last tokens have to be found in the text (none: all of it).
        opening: token ids that stand before the text.
        most: facts per example, at most (0: as many as ``SPACING`` allows).
        parts: a window is one example or several, one after another, each with its own facts: as many as one of
            these says, drawn anew for every window. Short examples are where looking back is learned first.
    """

    facts: Sequence[Tensor]
    answers: Sequence[Tensor]
    asked: Sequence[int] = ()
    opening: Sequence[int] = ()
    most: int = 0
    parts: tuple[int, ...] = (1,)

    @staticmethod
    def from_spans(ids: Tensor, seed: int, count: int = 256) -> Needles:
        """For text without a tokenizer: a cue and an answer, each a few tokens of the text from two places."""
        if ids.numel() < 4 * SPAN:
            raise LincompileError(f"the text has {ids.numel()} tokens, too few to make retrieval examples from")
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(0, ids.numel() - SPAN, (2, count), generator=generator)
        facts = [torch.cat([ids[p : p + SPAN].long() for p in pair]) for pair in places.T.tolist()]
        return Needles(facts, facts, [SPAN] * count)

    def __len__(self) -> int:
        return len(self.facts)

    def length(self, index: int) -> int:
        """Tokens that a fact takes, asked for once."""
        return len(self.facts[index]) + len(self.answers[index])

    def shortest(self) -> int:
        """Tokens of the shortest window that an example can be made of."""
        one = len(self.opening) + min(map(self.length, range(len(self))), default=0) + LOOP[0]
        return one * min(self.parts)

    def tokens(self) -> Tensor:
        """All token ids, one after another, int64 ``[N]``."""
        return torch.cat([torch.as_tensor(span).long() for span in (*self.facts, *self.answers, self.opening)])

    def to_find(self, index: int) -> Tensor:
        """Which tokens of an answer have to be found, bool ``[n]``."""
        size = len(self.answers[index])
        return torch.arange(size) >= size - (self.asked[index] if self.asked else size)

    def fingerprint(self) -> list[Any]:
        """What the examples depend on (JSON-able)."""
        sizes = torch.tensor([*map(len, (*self.facts, *self.answers, self.opening)), *self.asked])
        sums = [zlib.crc32(numbers.numpy().tobytes()) for numbers in (self.tokens(), sizes)]
        return [len(self), *sums, self.most, list(self.parts)]


class Made(NamedTuple):
    """Windows ``[B, T]`` or one, ``[T]``: tokens, which have to be found (bool), as how many each counts (int64)."""

    tokens: Tensor
    asked: Tensor
    repeats: Tensor


def check_stretch(stretch: float, share: float, methods: Iterable[str] = ()) -> None:
    """Raises ``LincompileError`` for a stretch that is none, or that the windows or a method have no use for."""
    if not 1 <= stretch <= MOST:
        raise LincompileError(f"--stretch {stretch:g}: text between facts counts 1 to {MOST:,} times")
    if stretch == 1:
        return
    if not share:
        raise LincompileError(f"--stretch {stretch:g} is about retrieval examples: add --retrieval SHARE")
    for name in methods:
        if name in METHODS and not method_class(name).repeatable:
            raise LincompileError(
                f"--stretch {stretch:g}: a token of {name} that comes again isn't the token scaled: leave it out, or "
                f"choose {', '.join(name for name in METHODS if method_class(name).repeatable)}"
            )


@dataclass(frozen=True)
class WithRetrieval:
    """Batches of which a share of the windows are retrieval examples, made from the windows themselves.

    Args:
        base: the windows; their shape stays.
        share: of the windows of all steps, chosen by seed and step number.
        stretch: the text between an example's facts counts in states (``linearization/stretch.py``) as if each of its
            tokens had stood there several times: as often as is drawn for each example, evenly in log-space from 1 to
            this, and rounded. The teacher, convolutions and softmax over a window see the window as it is.

    Raises:
        LincompileError: the stretch isn't one.
    """

    base: Batches
    needles: Needles
    share: float
    seed: int = 0
    stretch: float = 1.0

    def __post_init__(self) -> None:
        check_stretch(self.stretch, self.share)

    @property
    def length(self) -> int:
        """Tokens of the longest windows."""
        return self.base.length

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on (JSON-able)."""
        stretch = {} if self.stretch == 1 else {"stretch": self.stretch}
        own = {"retrieval": [self.share, self.seed, *self.needles.fingerprint()]}
        return self.base.fingerprint() | own | stretch

    def measure(self, count: int) -> Tensor:
        """The base's held-out windows: plain text."""
        return self.base.measure(count)

    def step(self, index: int) -> Tensor:
        """Tokens ``[B, T]`` of a step."""
        return self.made(index).tokens

    def made(self, index: int) -> Made:
        """The windows of a step."""
        made = _as_it_is(self.base.step(index))
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + index)
        chosen = torch.rand(len(made.tokens), generator=generator) < self.share
        for row in chosen.nonzero().flatten().tolist():
            for whole, part in zip(made, self.example(made.tokens[row], generator), strict=True):
                whole[row] = part
        return made

    def example(self, window: Tensor, generator: torch.Generator) -> Made:
        """A window ``[T]`` of one example or several."""
        parts = self.needles.parts[int(torch.randint(0, len(self.needles.parts), (1,), generator=generator))]
        made = [self._part(piece, generator) for piece in torch.tensor_split(window, parts)]
        return Made(*map(torch.cat, zip(*made, strict=True)))

    def _part(self, window: Tensor, generator: torch.Generator) -> Made:
        """One example: a fact for every ``SPACING`` tokens at most, and all of them asked for at its end.

        The window's own last tokens make room, or, in half of the examples, all but a passage of it, which is repeated:
        what comes again and again is not worth keeping. Windows too short for a fact come back as they are.
        """
        needles = self.needles
        most = min(max(1, len(window) // SPACING), needles.most or len(needles), len(needles))
        count = int(torch.randint(1, most + 1, (1,), generator=generator))
        picked = torch.randperm(len(needles), generator=generator)[:count].tolist()
        asked = [picked[i] for i in torch.randperm(count, generator=generator).tolist()]
        needed = len(needles.opening) + sum(map(needles.length, picked))
        filler = window[: max(0, len(window) - needed)]
        if len(filler) < LOOP[0]:
            return _as_it_is(window)
        if float(torch.rand((), generator=generator)) < LOOPS:
            filler = self._looped(filler, generator)
        places = torch.randint(0, len(filler) + 1, (count,), generator=generator).sort().values.tolist()
        times = self._times(generator)
        parts = [(torch.tensor(needles.opening, dtype=torch.int64), 1)]
        for begin, end, fact in zip([0, *places], places, picked, strict=False):
            parts += [(filler[begin:end], times), (needles.facts[fact], 1)]
        parts += [(filler[places[-1] :], times), *((needles.answers[i], 1) for i in asked)]
        tokens = torch.cat([part.to(window) for part, _ in parts])
        repeats = torch.cat([torch.full((len(part),), copies) for part, copies in parts])
        marks = torch.cat([needles.to_find(i) for i in asked])
        return Made(tokens, torch.cat([torch.zeros(len(tokens) - len(marks), dtype=torch.bool), marks]), repeats)

    def _times(self, generator: torch.Generator) -> int:
        """As how many of itself each token of an example's text counts."""
        if self.stretch == 1:
            return 1  # and nothing is drawn: the examples are those of runs that knew no stretch
        return round(float(self.stretch ** torch.rand((), generator=generator)))

    def _looped(self, filler: Tensor, generator: torch.Generator) -> Tensor:
        """As many tokens of a passage from ``filler``, over and over."""
        size = int(torch.randint(*LOOP, (1,), generator=generator))
        start = int(torch.randint(0, max(1, len(filler) - size), (1,), generator=generator))
        passage = filler[start : start + size]
        return passage.repeat(len(filler) // len(passage) + 1)[: len(filler)]


def _as_it_is(tokens: Tensor) -> Made:
    """Windows in which nothing has to be found."""
    return Made(tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.int64))
