"""Between the linear attentions: norms as one op each, and linear layers of one input as one.

A step of one token is bound by the number of kernels: a norm written out is seven, and q, k and v read the same input.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ...passes.graph import (
    Builder,
    aten,
    finish,
    get_attribute,
    is_symbolic,
    parent_of,
    same_dim,
    set_tensor,
    storage_root,
    target_of,
    tensor_of,
    value_of,
    written_nodes,
)
from ...passes.op_kinds import CASTS
from .chains import Lowered, Match, Mismatch, fuse, input_of, node_of

ops = torch.ops.lincompile
# How many stored tensors follow a layer's input: of its weight, and its bias.
_TENSORS = {aten.linear.default: 2, ops.int6_linear.default: 4, ops.int8_linear.default: 3}


def fuse_norms(module: GraphModule, report: Lowered) -> None:
    """Makes every RMS norm that is written out one ``aten.rms_norm``, in place.

    What is equal is the function: where the chain rounds a half-precision value before it multiplies by the weight, the
    op rounds once, after it.
    """
    for root in [node for node in module.graph.nodes if target_of(node) is aten.rsqrt.default]:
        report.norms += fuse(module, root, match_norm, report)
    finish(module)


def match_norm(root: Node) -> Match | None:
    """``root``: 1/√… of ``weight · x / √(mean(x²) + ε)``. None where it is of something else."""
    shifted = root.args[0]
    if target_of(shifted) not in (aten.add.Tensor, aten.add.Scalar):
        return None
    assert isinstance(shifted, Node)
    mean, epsilon = shifted.args[:2]
    if target_of(mean) is not aten.mean.dim or not isinstance(epsilon, (int, float)):
        return None
    assert isinstance(mean, Node)
    square = input_of(mean)
    wide = input_of(square)
    if target_of(square) is not aten.pow.Tensor_Scalar and square.args[:2] != (wide, wide):
        return None
    x, unit = _before_cast(wide), _only_user(root)
    factor = next((item for item in unit.args if item is not root), None)
    alike = isinstance(factor, Node) and _before_cast(factor) is x and tensor_of(factor).dtype == tensor_of(wide).dtype
    if target_of(unit) is not aten.mul.Tensor or not alike:
        raise Mismatch(f"'{root.name}' multiplies something else than what was squared")
    last = unit
    while target_of(user := _only_user(last)) in CASTS:
        last = user
    weight = next((item for item in user.args if item is not last), None)
    if target_of(user) is not aten.mul.Tensor or not isinstance(weight, Node) or weight.op != "get_attr":
        raise Mismatch(f"'{root.name}' belongs to a norm without a stored weight")
    size = tensor_of(weight).shape
    if len(size) != 1 or not same_dim(size[0], tensor_of(x).shape[-1]):
        raise Mismatch(f"'{weight.name}' isn't one number per channel")
    if len({tensor_of(node).dtype for node in (x, weight, user)}) > 1:
        raise Mismatch(f"'{weight.name}' isn't of its input's type")
    if tensor_of(x).dtype.itemsize < 4 and tensor_of(wide).dtype != torch.float32:
        raise Mismatch(f"'{square.name}' is summed in half precision")
    shape = tensor_of(x).shape
    time = next((axis for axis in range(1, len(shape)) if is_symbolic(shape[axis])), 0)

    def call(x: Any, weight: Any) -> tuple[Any, ...]:
        return x, [int(size[0])], weight, float(epsilon)

    return Match(aten.rms_norm.default, (x, weight), (user,), call, time, casts=False)


def _before_cast(node: Node) -> Node:
    return input_of(node) if target_of(node) in CASTS else node


def _only_user(node: Node) -> Node:
    if len(node.users) != 1:
        raise Mismatch(f"'{node.name}' is read by {len(node.users)} nodes")
    return next(iter(node.users))


def merge_masks(module: GraphModule) -> None:
    """Computes every bool tensor once, in place: each site makes its own mask of the one that came in.

    Only those: which op may be merged with its like depends on what it is, and these are all that repeats.
    """
    known: dict[Any, Node] = {}
    written = written_nodes(module)
    for node in list(module.graph.nodes):
        fake = value_of(node)
        if node.op != "call_function" or not isinstance(fake, Tensor) or fake.dtype != torch.bool:
            continue
        if any(storage_root(item) in written for item in (node, *node.all_input_nodes)):
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        # By how they are written: 1, 1.0 and True are equal, but ask for different types.
        key = node.target, repr(node.args), repr(node.kwargs)
        if key in known:
            node.replace_all_uses_with(known[key])
        else:
            known[key] = node
    finish(module)


def join_layers(module: GraphModule, report: Lowered, own: bool) -> None:
    """Makes linear layers that read the same input one layer with the rows of all, in place.

    The layers' own tensors, which other graphs may share, become views of the joined ones: nothing is stored twice.
    ``own``: the float ones, too. Somebody else's module would be saved, cast and shared otherwise than before.
    """
    pairs = _gated_pairs(module)
    for op, tensors in _TENSORS.items():
        if op is aten.linear.default and not own:
            continue
        alike: dict[Any, list[Node]] = defaultdict(list)
        for node in module.graph.nodes:
            if target_of(node) is op and all(map(_stored, args := _tensors(node, tensors))):
                kinds = tuple(item and tensor_of(item).dtype for item in args)
                product, _ = pairs.get(node, (None, 0))
                alike[node.args[0], product, kinds, tuple(node.args[tensors + 1 :])].append(node)
        for nodes in alike.values():
            nodes.sort(key=lambda node: pairs.get(node, (None, 0))[1])  # the gate before what it is multiplied with
        groups = [nodes for nodes in alike.values() if len(nodes) > 1]
        for (*_, options), nodes in alike.items():
            if len(nodes) > 1 and _apart(module, nodes, tensors, groups):
                _join(module, op, nodes, tensors, options)
                report.joined += len(nodes) - 1
    finish(module)


def _gated_pairs(module: GraphModule) -> dict[Node, tuple[Node, int]]:
    """Of each product ``silu(gate) · up`` of two layers: which product, and 0 for the gate, 1 for what is gated."""
    found: dict[Node, tuple[Node, int]] = {}
    for node in module.graph.nodes:
        if target_of(node) is not aten.mul.Tensor or not all(isinstance(item, Node) for item in node.args[:2]):
            continue
        for silu, up in (node.args[:2], node.args[1::-1]):
            if target_of(silu) is aten.silu.default and len(silu.users) == len(up.users) == 1:
                gate = input_of(silu)
                if len(gate.users) == 1 and gate.args[:1] == up.args[:1] and target_of(gate) is target_of(up):
                    found |= {gate: (node, 0), up: (node, 1)}
    return found


def _apart(module: GraphModule, nodes: list[Node], tensors: int, groups: list[list[Node]]) -> bool:
    """Whether no tensor is in two places: neither twice in these layers nor in others that are joined otherwise."""

    def places(layers: list[Node]) -> list[list[int]]:
        return [
            [get_attribute(module, str(item.target)).data_ptr() for item in _tensors(node, tensors) if item is not None]
            for node in layers
        ]

    mine = places(nodes)
    flat = [place for layer in mine for place in layer]
    if len(flat) != len(set(flat)):
        return False
    others = [theirs for theirs in map(places, groups) if theirs != mine]
    return not any(set(flat) & {place for layer in theirs for place in layer} for theirs in others)


def _tensors(node: Node, count: int) -> list[Any]:
    """A layer's stored tensors: weights, scales where it has some, and bias or None."""
    return [node.args[index] if index < len(node.args) else None for index in range(1, count + 1)]


def _path(node: Node, index: int) -> str:
    return str(node_of(node.args[index]).target)


def _stored(item: Any) -> bool:
    return item is None or (isinstance(item, Node) and item.op == "get_attr")


def _join(module: GraphModule, op: Any, nodes: list[Node], tensors: int, options: tuple[Any, ...]) -> None:
    make = Builder(module, nodes[0])
    joined: list[Node | None] = []
    for index, item in enumerate(_tensors(nodes[0], tensors), 1):
        if item is None:
            joined.append(None)
            continue
        paths = [_path(node, index) for node in nodes]
        whole = _rows_of([get_attribute(module, path) for path in paths])
        set_tensor(module, f"{paths[0]}_joined", whole, persistent=False)
        joined.append(make.attribute(f"{paths[0]}_joined", whole))
    y = make(op, nodes[0].args[0], *joined, *options)
    begin, axis = 0, tensor_of(y).dim() - 1
    for node in nodes:
        end = begin + int(tensor_of(node).shape[-1])
        node.replace_all_uses_with(make(aten.slice.Tensor, y, axis, begin, end))
        begin = end


def drop_unread(module: GraphModule) -> None:
    """Lets go of tensors that nothing in the graph reads any more: a copy of the module needn't hold them twice."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for path in [path for path, _ in named if path not in read]:
        delattr(*parent_of(module, path))


def _rows_of(parts: list[Tensor]) -> Tensor:
    """The rows of all parts, which become views of it; without a copy where they lie one after the other already."""
    first, rows = parts[0], [part.shape[0] for part in parts]
    place, begin = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != place or part.storage_offset() != begin or not part.is_contiguous():
            break
        begin += part.numel()
    else:
        shape = (sum(rows), *first.shape[1:])
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]  # one row's own may be anything
        return torch.as_strided(first.detach(), shape, strides, first.storage_offset())
    whole = torch.cat([part.detach() for part in parts])
    for part, own in zip(parts, torch.split(whole, rows), strict=True):
        part.data = own
    return whole
