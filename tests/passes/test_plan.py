"""The dry run's figures against what is then built: parameters, states and caches, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.plan import plan
from lincompile.passes.stateful import make_stateful

CONTEXT = 48


@pytest.mark.parametrize(
    "options", [{"attn": "gla"}, {"attn": "lawcat", "keep": (0,)}, {"attn": "lawcat", "window": 8}], ids=str
)
def test_the_plan_is_what_is_built(proved: Callable[[str], SimpleNamespace], options: dict[str, Any]) -> None:
    teacher = proved("nanogpt-gqa-5d").program
    student = Pipeline([LinearizeAttention(**options)])(teacher.clone())
    document = plan(teacher, student, contexts=(CONTEXT,))
    assert document["parameters_added"] == student.parameters - teacher.parameters
    (row,) = document["contexts"]
    for label, program in (("softmax", teacher), ("compiled", student)):
        step = make_stateful(program, check=False)
        seen = options.get("window", CONTEXT) if label == "compiled" else CONTEXT
        masks = seen if any(spec.role == "mask" for spec in step.states) else 0  # a byte a token, left out of the plan
        held = row[label]["kv_cache_bytes"] + row[label]["state_bytes"]
        assert held == step.state_bytes(1, CONTEXT) - masks, label
    before, after = row["softmax"], row["compiled"]
    kept = 1 if options.get("keep") else 0
    per_key = 2 * 4 * (8 + 8)  # four query heads of eight, q·k and p·v
    dense = before["decode_flops_per_token"] - 2 * per_key * CONTEXT
    assert before["prefill_flops_per_token"] == dense + 2 * per_key * CONTEXT // 2
    assert after["decode_flops_per_token"] > dense + kept * per_key * CONTEXT
