"""The step program that computes the logits of a chunk's last token only: what reading a prompt needs.

The vocabulary projection of a small model is a fifth of its work, and its output for a whole chunk is the largest
tensor of a prefill. What follows the last attention up to there treats each token by itself, so it gets the last
token's row, too: most of a layer. States are computed from all tokens, as before.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph import INT_MAX, argument, aten, expression, finish, is_symbolic, same_dim, target_of, tensor_of, value_of
from ..op_kinds import CASTS, POINTWISE, SAME, is_pointwise
from ..program import share_tensors
from ..stateful import StepProgram
from ..verify import op_name

_PACKED = ("int6_linear", "int8_linear")
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)


def last_token_only(step: StepProgram) -> StepProgram | None:
    """A step program with the same weights and states that returns logits ``[B, 1, V]``.

    None where its end isn't a linear layer followed by elementwise ops on that layer's output alone, or where the
    program is no graph (a compiled package).
    """
    if not isinstance(step.graph_module, GraphModule) or _projection(step.graph_module) is None:
        return None
    module = share_tensors(step.graph_module, {})
    projection = _projection(module)
    assert projection is not None
    alone = _alone(module, projection)
    cut: dict[Node, Node] = {}
    for node in [node for node in module.graph.nodes if node in alone]:
        for source in list(node.all_input_nodes) if node is not projection else [projection.args[0]]:
            assert isinstance(source, Node)
            if source in alone or (node is not projection and not _is_rows(source, projection)):
                continue
            if source not in cut:
                with module.graph.inserting_before(node):
                    cut[source] = module.graph.call_function(aten.slice.Tensor, (source, 1, -1, INT_MAX))
            node.replace_input_with(source, cut[source])
    for node in alone - {projection}:
        node.meta.pop("val", None)  # its shape is another now
    finish(module)
    return replace(step, graph_module=module)


def widest(step: StepProgram) -> int | None:
    """How many numbers for each token the largest tensor of a step holds, logits aside.

    Tensors that don't grow with the tokens of a step alone aren't counted: states, caches and their masks. None where
    nothing is known: no graph, or another end than :func:`last_token_only` takes.
    """
    module = step.graph_module
    end = _projection(module) if isinstance(module, GraphModule) else None
    if end is None:
        return None
    tokens = next(node for node in module.graph.nodes if node.op == "placeholder")
    rows = _size(tensor_of(tokens))
    most, beyond = 0, {end}
    for node in module.graph.nodes:
        if node.op != "call_function" or node in beyond:
            continue
        if not beyond.isdisjoint(node.all_input_nodes):
            beyond.add(node)
            continue
        value = value_of(node)
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(tensor, Tensor) and (numbers := _size(tensor) / rows).is_Integer:
                most = max(most, int(numbers))
    return most or None


def _size(value: Tensor) -> sympy.Expr:
    """How many numbers a tensor holds."""
    fixed = math.prod(size for size in value.shape if not is_symbolic(size))
    return math.prod((expression(size) for size in value.shape if is_symbolic(size)), start=sympy.Integer(fixed))


def _projection(module: GraphModule) -> Node | None:
    """The linear layer ``[B, t, d] → [B, t, V]`` that the graph's first output comes from."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    node = output.args[0][0] if isinstance(output.args[0], (list, tuple)) else None
    while isinstance(node, Node):
        if target_of(node) is aten.linear.default or op_name(node) == "int6_linear":
            return node
        if op_name(node) == "int6_layer" and _residual(node) is None:
            return node
        if target_of(node) not in POINTWISE | CASTS | SAME:
            return None
        inputs = [item for item in node.all_input_nodes if item.op != "get_attr"]
        node = inputs[0] if len(inputs) == 1 else None
    return None


def _residual(node: Node) -> Any:
    return argument(node, 4, "residual")


def _alone(module: GraphModule, projection: Node) -> set[Node]:
    """The projection, and what before it treats each token by itself and is read by these nodes only."""
    found = {projection}
    for node in reversed(module.graph.nodes):
        if node.users and all(user in found for user in node.users) and _treats_tokens_alone(node, projection):
            found.add(node)
    return found


def _treats_tokens_alone(node: Node, projection: Node) -> bool:
    target, inputs = target_of(node), node.all_input_nodes
    if node.op != "call_function" or not inputs or not _is_rows(node, projection):
        return False
    if target is aten.linear.default or op_name(node) in _PACKED or target in _NORMS:
        if target in _NORMS and len(argument(node, 1, "normalized_shape")) != 1:
            return False
        return _is_rows(node.args[0], projection) and all(item.op == "get_attr" for item in inputs[1:])
    if op_name(node) == "int6_layer":
        rows = [item for item in (node.args[0], _residual(node)) if item is not None]
        stored = [item for item in inputs if item not in rows]
        return all(_is_rows(item, projection) for item in rows) and all(item.op == "get_attr" for item in stored)
    if target is aten.slice.Tensor:  # of channels
        return argument(node, 1, "dim", 0) in (-1, 2)
    if target is aten.mean.dim:
        return argument(node, 1, "dim") == [-1] and bool(argument(node, 2, "keepdim", False))
    # A look-up's table is neither rows nor channels, and one along the tokens has other rows.
    return is_pointwise(target) and all(_is_rows(item, projection) or _is_channels(item) for item in inputs)


def _is_rows(node: Any, projection: Node) -> bool:
    """``[B, t, …]`` with the batch and tokens of what the projection reads."""
    value, like = value_of(node), value_of(projection.args[0])
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or value.dim() != 3 or like.dim() != 3:
        return False
    sizes = all(same_dim(value.shape[axis], like.shape[axis]) for axis in (0, 1))
    return sizes and is_symbolic(like.shape[1])


def _is_channels(node: Node) -> bool:
    """The same numbers for every token."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return False
    return not any(is_symbolic(size) for size in value.shape) and all(size == 1 for size in value.shape[:-1])
