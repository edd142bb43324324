"""Candidates with one score chain, the layers of one model usually: what is found of one is found of all.

Findings are shared, but not the names in a reason: each site names its own nodes.
"""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from ..graph import aten, target_of, tensor_of
from .match import Candidate


def signature(candidate: Candidate) -> Any:
    """Key under which two candidates have one score chain, masks and way to v (the layers of one model, usually)."""
    if candidate.softmax is None:
        shapes = (
            tuple(str(d) for d in tensor_of(candidate.q).shape),
            tuple(str(d) for d in tensor_of(candidate.k).shape),
        )
        return (candidate.form, candidate.mask, candidate.is_causal, candidate.scale, shapes)
    assert candidate.scores is not None
    chain = {candidate.scores, *candidate.chain}
    known: dict[Node, Any] = {candidate.scores: ("scores", tuple(str(d) for d in tensor_of(candidate.scores).shape))}

    def visit(item: Any) -> Any:
        if isinstance(item, (list, tuple)):
            return tuple(visit(part) for part in item)
        if not isinstance(item, Node):
            return str(item)
        if item not in known:
            known[item] = (
                (str(item.target), visit(item.args), visit(tuple(item.kwargs.values()))) if item in chain else item.name
            )
        return known[item]

    bias = candidate.scores.args[0] if target_of(candidate.scores) is aten.baddbmm.default else None
    known[candidate.softmax] = "softmax"
    return (visit(candidate.softmax.args[0]), visit(bias), str(candidate.scores.kwargs), visit(candidate.weights))


def of_twin(reason: str, first: Candidate, other: Candidate) -> str:
    """A reason found of ``first``, told of ``other``, which has the same :func:`signature`."""
    names: dict[str, str] = {}
    chains = tuple({each.scores, each.softmax, *each.chain} for each in (first, other))

    def walk(a: Any, b: Any) -> None:
        if isinstance(a, (list, tuple)):
            for part, twin in zip(a, b, strict=True):
                walk(part, twin)
        # Outside the chains both read the same nodes.
        elif isinstance(a, Node) and a in chains[0] and b in chains[1] and a.name not in names:
            names[a.name] = b.name
            if a is not first.scores:  # what comes before isn't part of it
                walk((a.args, tuple(a.kwargs.values())), (b.args, tuple(b.kwargs.values())))

    walk((first.softmax, first.weights), (other.softmax, other.weights))
    if not names:
        return reason
    quoted = "|".join(map(re.escape, names))
    return re.sub(f"'({quoted})'", lambda found: f"'{names[found[1]]}'", reason)
