"""Synthetic retrieval: facts strewn into a window of training text, and asked for at its end.

The teacher finds them again by attention; asking the student for the teacher's answers at long distances is what
teaches its states and gates to keep them. The facts are made from the training text by a seed, never from tests.
"""

from __future__ import annotations

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
    """Facts as token ids ``[n]``: as they stand in the text, and as they are asked for and answered at the end."""

    facts: Sequence[Tensor]
    answers: Sequence[Tensor]

    @staticmethod
    def from_spans(ids: Tensor, seed: int, count: int = 256) -> Needles:
        """For text without a tokenizer: a cue and an answer, each a few tokens of the text from two places."""
        if ids.numel() < 4 * SPAN:
            raise LincompileError(f"the text has {ids.numel()} tokens, too few to make retrieval examples from")
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(0, ids.numel() - SPAN, (2, count), generator=generator)
        facts = [torch.cat([ids[p : p + SPAN].long() for p in pair]) for pair in places.T.tolist()]
        return Needles(facts, facts)


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
        facts = sum(int(fact.sum()) for fact in self.needles.facts)
        return self.base.fingerprint() | {"retrieval": [self.share, self.seed, len(self.needles.facts), facts]}

    def measure(self, count: int) -> Tensor:
        """The base's held-out windows: plain text."""
        return self.base.measure(count)

    def step(self, index: int) -> Tensor:
        """Tokens ``[B, T]`` of a step."""
        windows = self.base.step(index)
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + index)
        chosen = torch.rand(len(windows), generator=generator) < self.share
        for row in chosen.nonzero().flatten().tolist():
            windows[row] = self.example(windows[row], generator)
        return windows

    def example(self, window: Tensor, generator: torch.Generator) -> Tensor:
        """A window ``[T]`` with one to ``T / SPACING`` facts, and all of them asked for at its end.

        The window's own last tokens make room, or, in half of the examples, all but a passage of it, which is repeated:
        what comes again and again is not worth keeping. Windows too short for a fact come back as they are.
        """
        most = min(max(1, len(window) // SPACING), len(self.needles.facts))
        count = int(torch.randint(1, most + 1, (1,), generator=generator))
        picked = torch.randperm(len(self.needles.facts), generator=generator)[:count].tolist()
        asked = [picked[i] for i in torch.randperm(count, generator=generator).tolist()]
        needed = sum(len(self.needles.facts[i]) + len(self.needles.answers[i]) for i in picked)
        filler = window[: len(window) - needed] if needed < len(window) // 2 else window
        if len(filler) == len(window):
            return window
        if float(torch.rand((), generator=generator)) < LOOPS:
            filler = self._looped(filler, generator)
        places = torch.randint(0, len(filler) + 1, (count,), generator=generator).sort().values.tolist()
        parts: list[Tensor] = []
        for begin, end, fact in zip([0, *places], places, picked, strict=False):
            parts += [filler[begin:end], self.needles.facts[fact]]
        parts.append(filler[places[-1] :])
        parts += [self.needles.answers[i] for i in asked]
        return torch.cat([part.to(window) for part in parts])

    def _looped(self, filler: Tensor, generator: torch.Generator) -> Tensor:
        """As many tokens of a passage from ``filler``, over and over."""
        size = int(torch.randint(*LOOP, (1,), generator=generator))
        start = int(torch.randint(0, max(1, len(filler) - size), (1,), generator=generator))
        passage = filler[start : start + size]
        return passage.repeat(len(filler) // len(passage) + 1)[: len(filler)]
