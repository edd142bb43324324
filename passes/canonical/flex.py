"""Writes ``flex_attention`` out as plain ATen ops, so that its score and mask functions are read like any others.

The functions are traced on scalars (a score and its batch, head, query and key indices). Pointwise ops mean the same
on whole tensors, so their graphs are copied with broadcasting index tensors in place of the scalars. What results is
the definition of flex_attention (torch/_higher_order_ops/flex_attention.py, ``math_attention``), which also has the
gradients that flex_attention lacks on the CPU.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph import SHAPE_ONLY, Builder, aten, get_attribute, same_dim, target_of, tensor_of, value_of
from ..op_kinds import POINTWISE


class _NotPointwise(Exception):
    """A score or mask function does more than pointwise ops on its indices."""


def lower_flex(module: GraphModule) -> int:
    """Replaces every flex_attention whose functions are pointwise; returns how many. The others stay as they are."""
    lowered = 0
    for node in list(module.graph.nodes):
        if getattr(target_of(node), "__name__", "") == "flex_attention" and _only_output_used(node):
            before = set(module.graph.nodes)
            try:
                output = _lower(module, node)
            except _NotPointwise:
                for new in reversed([n for n in module.graph.nodes if n not in before]):
                    module.graph.erase_node(new)
                continue
            for user in list(node.users):
                if user.args[1] == 0:
                    user.replace_all_uses_with(output)
                module.graph.erase_node(user)
            module.graph.erase_node(node)
            lowered += 1
    if lowered:
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
    return lowered


def _only_output_used(node: Node) -> bool:
    return all(target_of(user) is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)


def _lower(module: GraphModule, call: Node) -> Node:
    q, k, v, score_mod, block_mask, scale, _, score_extra, mask_extra = call.args[:9]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node) and isinstance(block_mask, (tuple, list))
    make = Builder(module, call)
    dtype = tensor_of(q).dtype
    if not same_dim(tensor_of(q).shape[0], tensor_of(k).shape[0]):
        raise _NotPointwise
    groups = int(tensor_of(q).shape[1]) // int(tensor_of(k).shape[1])
    if groups > 1:
        k, v = (make(aten.repeat_interleave.self_int, x, groups, 1) for x in (k, v))
    working = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype != working:
        q, k = (make(aten.to.dtype, x, working) for x in (q, k))
    raw = make(aten.matmul.default, q, make(aten.transpose.int, k, -2, -1))
    scores = make(aten.mul.Tensor, raw, scale)
    indices = [_index(make, raw, axis) for axis in range(4)]
    scored = _copy(module, make, score_mod, [scores, *indices, *score_extra])  # type: ignore[misc]
    seen = _copy(module, make, block_mask[-1], [*indices, *mask_extra])  # type: ignore[misc]
    masked = make(aten.where.ScalarOther, seen, scored, -float("inf"))
    weights = make(aten._safe_softmax.default, masked, -1)
    if dtype != working:
        weights = make(aten.to.dtype, weights, dtype)
    return make(aten.matmul.default, weights, v)


def _index(make: Builder, scores: Node, axis: int) -> Node:
    """``arange`` along one axis of the scores, shaped to broadcast against them."""
    size = make(aten.sym_size.int, scores, axis)
    index = make(aten.arange.default, size, device=tensor_of(scores).device)
    for _ in range(axis):
        index = make(aten.unsqueeze.default, index, 0)
    for _ in range(3 - axis):
        index = make(aten.unsqueeze.default, index, -1)
    return index


def _copy(module: GraphModule, make: Builder, function: Any, arguments: list[Any]) -> Node:
    """Inlines a function traced on scalars, on tensors instead."""
    body = get_attribute(module, str(function.target))
    mapping: dict[Node, Any] = {}
    inputs = iter(arguments)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            mapping[node] = next(inputs)
        elif node.op == "call_function" and _is_pointwise(node):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda item: mapping[item])
            mapping[node] = make(node.target, *args, **kwargs)
        elif _is_lookup(node):
            table, *places = (mapping[item] for item in node.args[3:])
            if tensor_of(table).dim() != len(places):
                raise _NotPointwise
            mapping[node] = make(aten.index.Tensor, table, places)
        elif node.op == "get_attr" and all(_is_lookup(user) for user in node.users):
            continue  # how flat_apply packs its arguments
        elif node.op != "output":
            raise _NotPointwise
    output = next(node for node in body.graph.nodes if node.op == "output").args[0]
    result = mapping[output[0] if isinstance(output, (tuple, list)) else output]
    assert isinstance(result, Node)
    return result


def _is_lookup(node: Node) -> bool:
    """``table[index, …]``, which flex_attention traces as a call of its own."""
    name = getattr(target_of(node), "__name__", "")
    return name == "flat_apply" and len(node.args) > 3 and str(node.args[2]).endswith("ModIndex")


def _is_pointwise(node: Node) -> bool:
    """Whether a scalar op does the same to every element of a tensor (a full lookup in a table included)."""
    target: Any = node.target
    if target is aten.index.Tensor:
        source, places = node.args[0], node.args[1]
        assert isinstance(source, Node) and isinstance(places, (list, tuple))
        value = value_of(source)
        return source.op == "placeholder" and value is not None and value.dim() == len(places) and None not in places
    if target in SHAPE_ONLY:
        return node.args[1] == [] if len(node.args) > 1 else False
    tags = getattr(target, "tags", ())
    return target in POINTWISE or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags)
