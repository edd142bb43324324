"""The knapsack is exact: compared with trying every combination."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lincompile.passes.errors import LincompileError
from lincompile.passes.quantization.allocate import Frontier, Option

OPTIONS = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4)


@given(groups=st.lists(OPTIONS, min_size=1, max_size=5), budget=st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_the_choice_is_the_best_of_all_combinations(groups: list[list[tuple[int, float]]], budget: int) -> None:
    named = [[Option(str(i), cost, score) for i, (cost, score) in enumerate(options)] for options in groups]
    frontier = Frontier(named)
    totals = [(sum(o.cost for o in picks), sum(o.score for o in picks)) for picks in itertools.product(*named)]
    affordable = [score for cost, score in totals if cost <= budget]
    if not affordable:
        with pytest.raises(LincompileError, match="no plan fits the budget; smallest is x"):
            frontier.within_cost(budget, "smallest is x")
        return
    index = frontier.within_cost(budget, "")
    picks = [options[int(name)] for options, name in zip(named, frontier.choices(index), strict=True)]
    assert sum(o.cost for o in picks) == frontier.costs[index] <= budget
    assert sum(o.score for o in picks) == pytest.approx(frontier.scores[index])
    assert frontier.scores[index] == pytest.approx(min(affordable))


@given(groups=st.lists(OPTIONS, min_size=1, max_size=4), limit=st.floats(0, 30))
@settings(max_examples=100, deadline=None)
def test_the_cheapest_within_a_score_is_found(groups: list[list[tuple[int, float]]], limit: float) -> None:
    named = [[Option(str(i), cost, score) for i, (cost, score) in enumerate(options)] for options in groups]
    frontier = Frontier(named)
    good = [
        sum(o.cost for o in picks) for picks in itertools.product(*named) if sum(o.score for o in picks) <= limit - 1e-9
    ]
    index = frontier.within_score(limit)
    if good:
        assert frontier.costs[index] <= min(good) and frontier.scores[index] <= limit
    assert list(frontier.costs) == sorted(set(frontier.costs)) and all(
        a > b for a, b in itertools.pairwise(frontier.scores)
    )


def test_many_groups_of_few_shapes_stay_small() -> None:
    shapes = [(6, 8, 16), (12, 16, 32), (36, 48, 96), (18, 24, 48)]
    groups = [
        [Option(n, c, s / (1 + i)) for n, c, s in zip("abc", shapes[i % 4], (3.0, 1.0, 0.0), strict=True)]
        for i in range(120)
    ]
    frontier = Frontier(groups)
    assert len(frontier.costs) < 20_000 and len(frontier.choices(len(frontier.costs) // 2)) == 120
