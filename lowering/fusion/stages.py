"""The chains of plain ops around a linear attention as one op each.

* convolution → map → both softmaxes (→ mask) becomes ``hedgehog_features``,
* gate projection → softplus → temperature (→ floor) (→ mask) becomes ``decay_gate``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ...passes.graph import argument, aten, finish, target_of, value_of
from ...passes.program import is_lincompile_op
from .chains import Lowered, Match, Mismatch, fuse, input_of, node_of, op_of

ops = torch.ops.lincompile


def fuse_stages(module: GraphModule) -> Lowered:
    """Applies both rules to every linear attention of a graph, in place."""
    report = Lowered()
    sites = [node for node in module.graph.nodes if is_lincompile_op(node, "linear_attention")]
    for site in sites:
        rules = [(site.args[0], match_features), (site.args[1], match_features), (site.args[3], match_gate)]
        for root, rule in rules:
            if not isinstance(root, Node):
                continue
            fused = fuse(module, past_cast(root), rule, report)
            if rule is match_features:
                report.features += fused
            else:
                report.gates += fused
    finish(module)
    return report


def match_features(root: Node) -> Match | None:
    """``root``: queries or keys of a linear attention. None where they aren't Hedgehog features at all."""
    node, mask_output = _without_mask(root, heads=True)
    grouped = target_of(node) is aten.flatten.using_ints
    if grouped:
        node = input_of(node)
    if target_of(node) is not aten.cat.default:
        return None
    halves = node.args[0]
    if not isinstance(halves, (list, tuple)) or len(halves) != 2 or not _last(argument(node, 1, "dim", 0), node):
        return None
    positive, negative = (op_of(half, aten.softmax.int, "a softmax") for half in halves)
    logits = input_of(positive)
    if input_of(op_of(input_of(negative), aten.neg.default, "a sign change before the second softmax")) is not logits:
        raise Mismatch("the two softmaxes read different logits")
    product, bias = (node_of(item) for item in op_of(logits, aten.add.Tensor, "a bias").args[:2])
    x, weight = (node_of(item) for item in op_of(product, aten.matmul.default, "the map's product").args[:2])
    weight, bias = _attribute(weight, "the map's weight"), _attribute(bias, "the map's bias")
    if grouped:
        x = input_of(op_of(x, aten.unflatten.int, "heads in groups"))
    x, conv_weight, state, mask, outputs = _convolution(x, root)
    if mask is None:
        mask = mask_output
    elif mask_output is not None and mask_output is not mask:
        raise Mismatch("the convolution's input and the features have different masks")
    if conv_weight is None and mask_output is None:
        mask = None

    def call(x: Any, taps: Any, state: Any, weight: Any, bias: Any, mask: Any) -> tuple[Any, ...]:
        return x, taps, state, weight, bias, mask, mask_output is not None

    leaves = (x, conv_weight, state, weight, bias, mask)
    return Match(ops.hedgehog_features.default, leaves, outputs, call, 2)


def _convolution(x: Node, root: Node) -> tuple[Node, Node | None, Node | None, Node | None, tuple[Node | None, ...]]:
    """(its input, weight, carried state, mask, the chain's outputs) of the convolution that ``x`` comes from."""
    conv = x
    for wanted in (aten.transpose.int, aten.unflatten.int, operator.getitem):
        if target_of(conv) is not wanted:
            return x, None, None, None, (root, None)
        conv = input_of(conv)
    if not is_lincompile_op(conv, "short_conv"):
        return x, None, None, None, (root, None)
    parts = {user.args[1]: user for user in conv.users}
    if len(parts) != len(conv.users) or 0 not in parts or len(parts[0].users) != 1:
        raise Mismatch("the convolution is read elsewhere, too")
    flat, mask = _without_mask(input_of(conv), heads=False)
    flat = op_of(flat, aten.flatten.using_ints, "heads side by side before the convolution")
    source = input_of(op_of(input_of(flat), aten.transpose.int, "heads side by side before the convolution"))
    state = conv.args[2] if len(conv.args) > 2 else None
    weight = _attribute(node_of(conv.args[1]), "the convolution's weight")
    return source, weight, state if isinstance(state, Node) else None, mask, (root, parts.get(1))


def match_gate(root: Node) -> Match | None:
    """``root``: the log-decays of a linear attention. None where they aren't a projected softplus."""
    node, mask = _without_mask(root, heads=True)
    if target_of(node) is not aten.transpose.int:
        return None
    shaped = input_of(node)
    if target_of(shaped) is not aten.unflatten.int:
        return None
    divided, lowest = _without_floor(input_of(shaped))
    op_of(divided, aten.div.Tensor, "the gate's temperature")
    temperature = divided.args[1]
    if not isinstance(temperature, (int, float)):
        raise Mismatch("the gate's temperature isn't a number")
    outer = op_of(input_of(divided), aten.neg.default, "−softplus(−x)")
    inner = op_of(
        input_of(op_of(input_of(outer), aten.softplus.default, "−softplus(−x)")), aten.neg.default, "−softplus(−x)"
    )
    linear = op_of(input_of(inner), aten.linear.default, "the gate's projection")
    if len(linear.args) < 3:
        raise Mismatch("the gate's projection has no bias")
    z, weight, bias = (node_of(item) for item in linear.args[:3])
    weight, bias = _attribute(weight, "the gate's weight"), _attribute(bias, "the gate's bias")
    sizes = argument(shaped, 2, "sizes")
    if not isinstance(sizes, (list, tuple)) or not isinstance(sizes[0], int) or sizes[0] < 1:
        raise Mismatch("the gate's heads aren't a fixed number")
    kv_heads = sizes[0]

    def call(z: Any, weight: Any, bias: Any, mask: Any) -> tuple[Any, ...]:
        return z, weight, bias, mask, kv_heads, float(temperature), lowest

    return Match(ops.decay_gate.default, (z, weight, bias, mask), (root,), call, 1, wide=(2,))


def _without_floor(node: Node) -> tuple[Node, float | None]:
    """What a gate's floor is put under, and the floor; None where there is none."""
    if target_of(node) is not aten.clamp.default:
        return node, None
    lowest, highest = argument(node, 1, "min"), argument(node, 2, "max")
    if not isinstance(lowest, (int, float)) or highest is not None:
        raise Mismatch("the gate's log-decays are bounded by more than a floor")
    return input_of(node), float(lowest)


def _last(dim: Any, node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and dim in (-1, value.dim() - 1)


def _attribute(node: Node, what: str) -> Node:
    """A parameter, seen through an axis of length one."""
    while target_of(node) is aten.unsqueeze.default:
        node = input_of(node)
    if node.op != "get_attr":
        raise Mismatch(f"{what} is computed or quantized ('{node.name}')")
    return node


def past_cast(node: Node) -> Node:
    """The node, or what it casts."""
    return input_of(node) if target_of(node) is aten.to.dtype and isinstance(node.args[0], Node) else node


def _without_mask(node: Node, heads: bool) -> tuple[Node, Node | None]:
    """``node`` without a factor that is a bool mask ``[B, T]``, and that mask."""
    if target_of(node) is not aten.mul.Tensor:
        return node, None
    for value, factor in (node.args[:2], node.args[1::-1]):
        found = factor
        while isinstance(found, Node) and target_of(found) in (aten.unsqueeze.default, aten.to.dtype):
            found = input_of(found)
        fake = value_of(found)
        is_mask = isinstance(fake, Tensor) and fake.dtype == torch.bool and fake.dim() == 2
        if is_mask and found is not factor and isinstance(found, Node) and isinstance(value, Node):
            return value, found
    return node, None
