"""For steps of one token, which are bound by the number of kernels: what surrounds a product becomes a part of it.

* both features and the gate of a linear attention become ``lawcat_inputs``,
* a packed layer becomes ``int6_layer`` with the norm or the gated product before it and the sum after it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ...passes.graph import argument, aten, finish, same_dim, target_of, tensor_of
from ...passes.program import is_lincompile_op
from .chains import Lowered, Match, Mismatch, fuse, input_of, node_of
from .stages import past_cast

ops = torch.ops.lincompile


def fuse_inputs(module: GraphModule, report: Lowered) -> None:
    """Applies the first rule to every linear attention of a graph, in place."""
    for site in [node for node in module.graph.nodes if is_lincompile_op(node, "linear_attention")]:
        report.inputs += fuse(module, site, match_inputs, report)
    finish(module)


def fuse_packed(module: GraphModule, report: Lowered) -> None:
    """Applies the second to every packed layer of a graph, in place."""
    for layer in [node for node in module.graph.nodes if is_lincompile_op(node, "int6_linear")]:
        report.layers += fuse(module, layer, match_layer, report)
    finish(module)


def match_inputs(site: Node) -> Match | None:
    """``site``: a linear attention. None where it isn't LAWCAT's, with convolutions, features and a low-rank gate."""
    if not all(isinstance(item, Node) for item in (*site.args[:2], site.args[3])):
        return None
    *sides, gate = (past_cast(node_of(item)) for item in (*site.args[:2], site.args[3]))
    q, k = (input_of(side) if target_of(side) is operator.getitem else side for side in sides)
    if not all(is_lincompile_op(side, "hedgehog_features") for side in (q, k)):
        return None
    if not is_lincompile_op(gate, "decay_gate"):
        return None
    z, up, bias, mask, kv_heads, temperature, lowest = gate.args
    if any(side.args[1] is None or side.args[2] is None for side in (q, k)):
        return None  # without a convolution, or one that carries no state
    project = node_of(z)
    if target_of(project) is not aten.linear.default or argument(project, 2, "bias") is not None:
        raise Mismatch(f"the gate of '{site.name}' isn't a projection without bias")
    down = node_of(project.args[1])
    if {q.args[5], k.args[5]} != {mask} or q.args[6] or (mask is not None and not k.args[6]):
        raise Mismatch(f"the features and the gate of '{site.name}' have different masks")
    x, norm_weight, epsilon = _norm(input_of(project), project)
    outputs = (*(_output(side, 0) for side in (q, k)), gate, *(_output(side, 1) for side in (q, k)))

    def call(*leaves: Any) -> tuple[Any, ...]:
        return *leaves, epsilon, kv_heads, temperature, lowest

    leaves = (*q.args[:5], *k.args[:5], x, norm_weight, down, up, bias, mask)
    return Match(ops.lawcat_inputs.default, leaves, outputs, call, 2, wide=(14,))  # type: ignore[arg-type]


def _output(node: Node, index: int) -> Node | None:
    found = [user for user in node.users if user.args[1] == index]
    if len(found) > 1:
        raise Mismatch(f"an output of '{node.name}' is taken twice")
    return found[0] if found else None


def _norm(x: Node, reader: Node) -> tuple[Node, Node | None, float]:
    """A norm's input, weight and ε, where the reader and packed layers are all that reads it; otherwise x itself."""
    weight, epsilon = argument(x, 2, "weight"), argument(x, 3, "eps")
    taken = all(user is reader or (is_lincompile_op(user, "int6_linear") and user.args[0] is x) for user in x.users)
    if target_of(x) is not aten.rms_norm.default or not isinstance(weight, Node) or epsilon is None or not taken:
        return x, None, 0.0
    if len(argument(x, 1, "normalized_shape")) != 1 or weight.op != "get_attr":
        return x, None, 0.0  # a kernel reads stored weights before the one in front of it ends
    if tensor_of(weight).dtype != tensor_of(input_of(x)).dtype:
        return x, None, 0.0
    return input_of(x), weight, float(epsilon)


def match_layer(layer: Node) -> Match | None:
    """``layer``: a packed linear. None where nothing stands beside it that it could take in."""
    whole, residual, gated = layer, None, False
    user = next(iter(layer.users)) if len(layer.users) == 1 else layer
    if target_of(user) is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1 and user.args[0] is not user.args[1]:
        other = user.args[1] if user.args[0] is layer else user.args[0]
        if isinstance(other, Node) and _alike(other, layer) and _alike(user, layer):
            whole, residual = user, other
    x = input_of(layer)
    source, norm_weight, epsilon = _norm(x, layer)
    if norm_weight is None:
        halves = _gated(x)
        source, gated = (x, False) if halves is None else (halves, True)
    if source is x and residual is None:
        return None
    group_size, activation = layer.args[5:7]

    def call(x: Any, norm_weight: Any, residual: Any, hi: Any, lo: Any, scale: Any, bias: Any) -> tuple[Any, ...]:
        return x, norm_weight, epsilon, gated, residual, hi, lo, scale, bias, group_size, activation

    leaves = (source, norm_weight, residual, *layer.args[1:5])
    time = tensor_of(source).dim() - 2
    return Match(ops.int6_layer.default, leaves, (whole,), call, max(0, time), packed=(3, 4, 5))  # type: ignore[arg-type]


def _alike(a: Node, b: Node) -> bool:
    first, second = tensor_of(a), tensor_of(b)
    return first.dtype == second.dtype and list(first.shape) == list(second.shape)


def _gated(x: Node) -> Node | None:
    """``[gate | up]`` where x is ``silu(gate) · up`` of its first and its second half, and of nothing else in it."""
    if target_of(x) is not aten.mul.Tensor or len(x.users) != 1:
        return None
    for silu, up in (x.args[:2], x.args[1::-1]):
        if target_of(silu) is aten.silu.default and isinstance(silu, Node) and isinstance(up, Node):
            gate = input_of(silu)
            if target_of(gate) is target_of(up) is aten.slice.Tensor and gate.args[0] is up.args[0]:
                base = input_of(gate)
                axis, width = tensor_of(base).dim() - 1, tensor_of(x).shape[-1]
                halves = ((axis, 0, width), (axis, width, 2 * width))
                if (gate.args[1:], up.args[1:]) == halves and same_dim(tensor_of(base).shape[-1], 2 * width):
                    return base
    return None
