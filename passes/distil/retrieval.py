"""Synthetic retrieval: facts strewn into a window of training text, and asked for at its end.

The teacher finds them again by attention; asking the student for the teacher's answers at long distances is what
teaches its states and gates to keep them. The facts are made from the training text by a seed, never from tests.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LincompileError
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


@dataclass(frozen=True)
class WithRetrieval:
    """Batches of which a share of the windows are retrieval examples, made from the windows themselves.

    Args:
        base: the windows; their shape stays.
        share: of the windows of all steps, chosen by seed and step number.
    """

    base: Batches
    needles: Needles
    share: float
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest windows."""
        return self.base.length

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on (JSON-able)."""
        return self.base.fingerprint() | {"retrieval": [self.share, self.seed, *self.needles.fingerprint()]}

    def measure(self, count: int) -> Tensor:
        """The base's held-out windows: plain text."""
        return self.base.measure(count)

    def step(self, index: int) -> Tensor:
        """Tokens ``[B, T]`` of a step."""
        return self.made(index)[0]

    def made(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T]`` of a step, and which of them have to be found in their windows (bool)."""
        windows = self.base.step(index)
        asked = torch.zeros_like(windows, dtype=torch.bool)
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + index)
        chosen = torch.rand(len(windows), generator=generator) < self.share
        for row in chosen.nonzero().flatten().tolist():
            windows[row], asked[row] = self.example(windows[row], generator)
        return windows, asked

    def example(self, window: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A window ``[T]`` of one example or several, and which of its tokens have to be found (bool)."""
        parts = self.needles.parts[int(torch.randint(0, len(self.needles.parts), (1,), generator=generator))]
        made = [self._part(piece, generator) for piece in torch.tensor_split(window, parts)]
        return torch.cat([tokens for tokens, _ in made]), torch.cat([asked for _, asked in made])

    def _part(self, window: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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
            return window, torch.zeros_like(window, dtype=torch.bool)
        if float(torch.rand((), generator=generator)) < LOOPS:
            filler = self._looped(filler, generator)
        places = torch.randint(0, len(filler) + 1, (count,), generator=generator).sort().values.tolist()
        parts = [torch.tensor(needles.opening, dtype=torch.int64)]
        for begin, end, fact in zip([0, *places], places, picked, strict=False):
            parts += [filler[begin:end], needles.facts[fact]]
        parts.append(filler[places[-1] :])
        tokens = torch.cat([part.to(window) for part in (*parts, *(needles.answers[i] for i in asked))])
        marks = torch.cat([needles.to_find(i) for i in asked])
        return tokens, torch.cat([torch.zeros(len(tokens) - len(marks), dtype=torch.bool), marks])

    def _looped(self, filler: Tensor, generator: torch.Generator) -> Tensor:
        """As many tokens of a passage from ``filler``, over and over."""
        size = int(torch.randint(*LOOP, (1,), generator=generator))
        start = int(torch.randint(0, max(1, len(filler) - size), (1,), generator=generator))
        passage = filler[start : start + size]
        return passage.repeat(len(filler) // len(passage) + 1)[: len(filler)]
