"""Echoes: spans of a window that come again further on, for the student to learn to copy.

A name that was rare the first time is easy the second: softmax attention finds where it stood (an induction head,
arXiv 2209.11895) and reads on from there. A student of linear attention has to learn to look back by content, and on
prose in which few things longer than two tokens recur it doesn't: beside a window of 64 tokens it copied within those
and not at all beyond them. The teacher copies a span that comes again almost surely, so where the training windows hold
some the student's loss says what it lacks.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LincompileError
from .data import Batches

SPACING = 96  # tokens of a window for each echo
SHORTEST, LONGEST = 2, 64  # tokens of an echo
NEAREST = 16  # tokens from where a span begins to where it begins again
FAR = 64  # tokens: what came again from farther back, no window of the recipes holds


@dataclass(frozen=True)
class WithEchoes:
    """Batches of which a share of the windows repeat spans of themselves.

    Lengths of spans and distances to where they stood are spread evenly in log-space, distances up to all that comes
    before; what the echoes take is cut off at the window's end.

    Args:
        base: the windows; their shape stays.
        share: of the windows of all steps, chosen by seed and step number.

    Raises:
        LincompileError: the share isn't one.
    """

    base: Batches
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)

    @property
    def length(self) -> int:
        """Tokens of the longest windows."""
        return self.base.length

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on (JSON-able)."""
        return self.base.fingerprint() | {"echoes": [self.share, self.seed, SPACING, SHORTEST, LONGEST, NEAREST]}

    def measure(self, count: int) -> Tensor:
        """The base's held-out windows: plain text."""
        return self.base.measure(count)

    def step(self, index: int) -> Tensor:
        """Tokens ``[B, T]`` of a step."""
        windows = self.base.step(index)
        draw = random.Random((self.seed + 1) * 1_000_003 + index)
        for row in range(len(windows)):
            if draw.random() < self.share:
                windows[row] = windows[row][torch.tensor(echoed(windows.shape[1], draw))]
        return windows


def check_share(share: float) -> None:
    """Raises ``LincompileError`` for a share of windows that isn't between 0 and 1."""
    if not 0 <= share <= 1:
        raise LincompileError(f"--echoes {share:g}: the share of windows that repeat spans is from 0 to 1")


def echoed(length: int, draw: random.Random) -> list[int]:
    """Where each token of a window of ``length`` with echoes stands in the window without."""
    count = max(1, length // SPACING) if length > NEAREST else 0
    places = sorted(draw.randrange(NEAREST, length) for _ in range(count))
    order: list[int] = []
    taken = 0
    for place in places:
        if (own := place - len(order)) > 0:  # an echo may have grown past this place
            order += range(taken, taken + own)
            taken += own
        distance = round(_log_uniform(draw, NEAREST, len(order)))
        begin = len(order) - distance
        order += order[begin : begin + min(round(_log_uniform(draw, SHORTEST, LONGEST)), distance)]
    order += range(taken, taken + max(0, length - len(order)))
    return order[:length]


def _log_uniform(draw: random.Random, low: int, high: int) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def from_afar(tokens: list[int]) -> Tensor:
    """Which tokens followed the same token before, last over ``FAR`` tokens ago: bool ``[T]``, the first False.

    What a model must look up (the associative recall of arXiv 2312.04927).
    """
    last: dict[tuple[int, int], int] = {}
    far = [False]
    for place, pair in enumerate(itertools.pairwise(tokens)):
        far.append(pair in last and place - last[pair] > FAR)
        last[pair] = place
    return torch.tensor(far, dtype=torch.bool)
