"""Checks a program between passes against a table of op contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.int6_linear.codes import ACTIVATIONS
from ..kernels.int6_linear.pack import group_count, plane_bytes
from .graph import argument, expression, same_dim, target_of, value_of
from .program import Program

Rule = Callable[[Node], str | None]


def verify(program: Program) -> str | None:
    """The first broken contract, naming the node, or None when the graph is sound."""
    try:
        program.graph_module.graph.lint()
    except RuntimeError as error:
        return str(error)
    for node in program.graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and "val" not in node.meta:
            return f"node '{node.name}' ({node.target}) carries no shape: insert nodes with lincompile's Builder"
        name = op_name(node)
        if name in CONTRACTS:
            problem = CONTRACTS[name](node)
            if problem:
                return f"node '{node.name}' ({name}): {problem}"
    for site in program.sites:
        if site.node is not None and site.node.graph is not program.graph_module.graph:
            return f"site '{site.path}' points at node '{site.node.name}' of another graph"
    return None


def op_name(node: Node) -> str:
    """``softmax_attention`` for a node that calls ``torch.ops.lincompile.softmax_attention``, '' for other nodes."""
    text = str(target_of(node) or "")
    return text.split(".")[1] if text.startswith("lincompile.") else ""


def _shape(node: Any) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _heads(node: Node) -> str | None:
    q, k, v = (_shape(node.args[i]) for i in range(3))
    if not (len(q) == len(k) == len(v) == 4):
        return f"q, k, v must have 4 axes [B, heads, T, dim], got {len(q)}, {len(k)}, {len(v)}"
    if not (same_dim(q[3], k[3]) and same_dim(k[1], v[1]) and same_dim(k[2], v[2])):
        return f"q {q}, k {k} and v {v} don't fit"
    heads, kv_heads = expression(q[1]), expression(k[1])
    if heads.is_Integer and kv_heads.is_Integer and heads % kv_heads:
        return f"{heads} query heads aren't a multiple of {kv_heads} KV heads"
    return None


def _softmax(node: Node) -> str | None:
    kind, window = argument(node, 4, "kind"), argument(node, 5, "window")
    if kind not in ("full", "causal", "sliding"):
        return f"kind '{kind}' isn't full, causal or sliding"
    if kind == "sliding" and window < 1:
        return f"a sliding window of {window}"
    padding = node.args[3]
    if padding is not None and value_of(padding).dtype != torch.bool:
        return "key_padding must be bool (True = real token)"
    return _heads(node)


def _linear(node: Node) -> str | None:
    decay, causal = node.args[3], argument(node, 6, "causal")
    if decay is not None:
        if not causal:
            return "a decay needs causal=True"
        k, g = _shape(node.args[1]), _shape(decay)
        if (
            len(g) != 4
            or not same_dim(g[1], k[1])
            or not same_dim(g[2], k[2])
            or not (same_dim(g[3], 1) or same_dim(g[3], k[3]))
        ):
            return f"log_decay {g} doesn't fit k {k}"
    return _heads(node)


def _short_conv(node: Node) -> str | None:
    x, weight = _shape(node.args[0]), _shape(node.args[1])
    return (
        None
        if len(x) == 3 and len(weight) == 2 and same_dim(x[2], weight[0])
        else f"x {x} and weight {weight} don't fit"
    )


def _int6(node: Node) -> str | None:
    x, hi, lo, scale = (_shape(node.args[i]) for i in range(4))
    if len(hi) != 2 or len(lo) != 2 or len(scale) != 2 or not x:
        return f"weight_hi {hi}, weight_lo {lo} and weight_scale {scale} must have two axes"
    columns = (*plane_bytes(int(x[-1])), group_count(int(x[-1]), argument(node, 5, "group_size")))
    if (hi[1], lo[1], scale[1]) != columns or not hi[0] == lo[0] == scale[0]:
        return f"weight_hi {hi}, weight_lo {lo} and weight_scale {scale} don't fit an input of {x[-1]} features"
    return _activation(argument(node, 6, "activation"))


def _int6_embedding(node: Node) -> str | None:
    hi, lo, scale = (_shape(node.args[i]) for i in range(1, 4))
    width, group_size = argument(node, 4, "in_features"), argument(node, 5, "group_size")
    rows, columns = {shape[0] for shape in (hi, lo, scale)}, (*plane_bytes(width), group_count(width, group_size))
    if len(rows) != 1 or (hi[1], lo[1], scale[1]) != columns:
        return f"weight_hi {hi}, weight_lo {lo} and weight_scale {scale} don't hold rows of {width} features"
    return None


def _int8(node: Node) -> str | None:
    x, weight, scale = (_shape(node.args[i]) for i in range(3))
    if len(weight) != 2 or not x or not same_dim(x[-1], weight[1]):
        return f"weight {weight} doesn't fit x {x}"
    if scale != (weight[0], group_count(int(weight[1]), argument(node, 4, "group_size"))):
        return f"weight_scale {scale} doesn't fit weight {weight}"
    return _activation(argument(node, 5, "activation"))


def _activation(value: str) -> str | None:
    return None if value in ACTIVATIONS else f"activation '{value}' isn't one of {', '.join(ACTIVATIONS)}"


CONTRACTS: dict[str, Rule] = {
    "softmax_attention": _softmax,
    "linear_attention": _linear,
    "gated_delta": _heads,
    "short_conv": _short_conv,
    "int6_linear": _int6,
    "int6_embedding": _int6_embedding,
    "int8_linear": _int8,
}
