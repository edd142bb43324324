"""Attention that the walk of ``match`` doesn't reach: nothing is proved about it, but it is found and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph import aten, get_attribute, is_symbolic, symbols_in, target_of, tensor_of, value_of

REACH = 24  # nodes looked at on either side of a softmax
# What makes new features: scores don't pass through it (but for a linear map over heads, whose axes are moved before).
FEATURES = frozenset(
    {
        aten.linear.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.embedding.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.scaled_dot_product_attention.default,
    }
)
MOVES = frozenset({aten.permute.default, aten.transpose.int})
Path = list[Node]


def path_to_scores(softmax: Node, data: set[Node], contractions: frozenset[object]) -> Path | None:
    """From a softmax's input up, through any op that keeps scores, to a product of data over the sequence."""

    def inputs(node: Node) -> Iterable[Node]:
        if _new_features(node) or _product(node, data, contractions):
            return ()
        return (x for x in node.all_input_nodes if x in data and isinstance(value_of(x), Tensor))

    def found(node: Node) -> bool:
        if not _product(node, data, contractions):
            return False
        return bool(symbols_in(tensor_of(node).shape[-1])) and tensor_of(node).dim() >= 3

    start = softmax.args[0]
    return _search(start, inputs, found) if isinstance(start, Node) and start in data else None


def path_to_values(softmax: Node, data: set[Node], contractions: frozenset[object]) -> Path | None:
    """From a softmax down, through any op that keeps probabilities, to a product with data (or its terms, summed)."""

    def users(node: Node) -> Iterable[Node]:
        if _new_features(node):
            return ()
        return (x for x in node.users if isinstance(value_of(x), Tensor) and not is_symbolic(value_of(x)))

    return _search(softmax, users, lambda node: _product(node, data, contractions) or _summed_product(node, data))


def _new_features(node: Node) -> bool:
    """An op that scores don't pass through: not a linear map over heads, whose axes are moved before."""
    moved = target_of(node) is aten.linear.default and target_of(node.args[0]) in MOVES
    return target_of(node) in FEATURES and not moved


def _product(node: Node, data: set[Node], contractions: frozenset[object]) -> bool:
    """A product of two tensors of data. With a constant (a mixture of heads, say) scores are still scores."""
    factors = [x for x in node.all_input_nodes if x in data and isinstance(value_of(x), Tensor)]
    return target_of(node) in contractions and len(factors) >= 2


def _summed_product(node: Node, data: set[Node]) -> bool:
    """``(p · v).sum(axis)``: a product that is written with broadcasting."""
    terms = node.args[0] if target_of(node) is aten.sum.dim_IntList else None
    if not isinstance(terms, Node) or target_of(terms) is not aten.mul.Tensor:
        return False
    factors = [x for x in terms.args if isinstance(x, Node) and x in data]
    return len(factors) == 2 and factors[0] is not factors[1]


def _search(start: Node, following: Callable[[Node], Iterable[Node]], found: Callable[[Node], bool]) -> Path | None:
    """The shortest path from ``start`` to a node that is ``found``."""
    came_from: dict[Node, Node | None] = {start: None}
    pending = [start]
    for node in pending:
        if found(node):
            path = [node]
            while (before := came_from[path[-1]]) is not None:
                path.append(before)
            return path[::-1]
        if len(pending) > REACH:
            return None
        for item in following(node):
            if item not in came_from:
                came_from[item] = node
                pending.append(item)
    return None


def regions(module: GraphModule) -> list[tuple[Node, GraphModule]]:
    """Ops that run a graph of their own (``torch.cond``, autocast, loops), and each of those graphs."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            for item in node.all_input_nodes:
                inner = get_attribute(module, str(item.target)) if item.op == "get_attr" else None
                if isinstance(inner, GraphModule):
                    found.append((node, inner))
    return found
