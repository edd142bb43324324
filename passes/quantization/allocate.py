"""Chooses one scheme per group of layers: an exact multiple-choice knapsack, solved on its Pareto frontier.

Dynamic programming over groups, keeping every total that isn't dominated (no cheaper total has as low a score). Nothing
is rounded, so the answer is the optimum for the scores given; the frontier stays small because a model has few distinct
layer shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import LincompileError


@dataclass(frozen=True)
class Option:
    """One choice for a group: a scheme's name, its cost (whole units: bits, bytes, nanoseconds), its score (a loss)."""

    scheme: str
    cost: int
    score: float


class Frontier:
    """Every non-dominated (total cost, total score) over ``groups``, with the choices that reach it.

    Costs ascend and scores strictly descend along the frontier.
    """

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        self._groups = groups
        self._back: list[NDArray[np.int64]] = []
        self._sizes = [1]
        self.costs: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self.scores: NDArray[np.float64] = np.zeros(1)
        for options in groups:
            costs = np.array([o.cost for o in options], dtype=np.int64)[:, None] + self.costs
            scores = np.array([o.score for o in options])[:, None] + self.scores
            order = np.lexsort((scores.ravel(), costs.ravel()))
            sorted_scores = scores.ravel()[order]
            best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_scores)[:-1]])
            kept = order[sorted_scores < best_before]
            self.costs, self.scores = costs.ravel()[kept], scores.ravel()[kept]
            self._back.append(kept)
            self._sizes.append(len(kept))

    def choices(self, index: int) -> list[str]:
        """The scheme of each group at a point of the frontier."""
        picked: list[str] = []
        for level in reversed(range(len(self._groups))):
            option, index = divmod(int(self._back[level][index]), self._sizes[level])
            picked.append(self._groups[level][option].scheme)
        return picked[::-1]

    def within_cost(self, budget: int, what: str) -> int:
        """The point of lowest score whose cost is at most ``budget``.

        Raises:
            LincompileError: even the cheapest choice costs more; says ``what`` the smallest possible is.
        """
        index = int(np.searchsorted(self.costs, budget, side="right")) - 1
        if index < 0:
            raise LincompileError(f"quantize: no plan fits the budget; {what}")
        return index

    def within_score(self, limit: float) -> int:
        """The cheapest point whose score is at most ``limit`` (the most accurate one when none is)."""
        fits = np.nonzero(self.scores <= limit)[0]
        return int(fits[0]) if len(fits) else len(self.scores) - 1
