"""Lowering to Triton: the chains of plain ops around linear attention become one op each.

Two rules, each of pattern, check and replacement:

* convolution → map → both softmaxes (→ mask) becomes ``hedgehog_features``,
* gate projection → softplus → temperature (→ mask) becomes ``decay_gate``.

A match proposes; what decides is that the chain and the op agree on random inputs in float64, at several lengths,
with random weights, masks and carried states. What isn't matched or doesn't agree stays as it is, with the reason.
A saved artefact holds the plain graph, which every target understands; sessions on a GPU run the lowered one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ..passes.graph import argument, aten, expression, finish, target_of, value_of
from ..passes.program import is_lincompile_op, share_tensors
from ..passes.stateful import StepProgram

ops = torch.ops.lincompile
LENGTHS = (1, 2, 9)
TOLERANCE = 1e-9


class Mismatch(Exception):
    """Why a chain isn't the one a rule looks for."""


@dataclass
class Lowered:
    """What was fused, and why the rest was not (by the name of the node that stays)."""

    features: int = 0
    gates: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for users."""
        text = f"Triton: {self.features} feature chains and {self.gates} gates became one op each"
        if self.kept:
            first = next(iter(self.kept))
            text += f"; {len(self.kept)} stay as they are ('{first}': {self.kept[first]})"
        return text


@dataclass(frozen=True)
class Match:
    """A chain from ``leaves`` to ``outputs``, and the op that would take its place.

    ``leaves`` are by name, in the op's order, None where absent; the first is the tensor ``[B, …, T, …]`` whose axes
    ``batch`` and ``time`` are. ``call`` takes the leaves (nodes or tensors) to the op's arguments.
    """

    op: Any
    leaves: tuple[Node | None, ...]
    outputs: tuple[Node | None, ...]
    call: Callable[..., tuple[Any, ...]]
    time: int


def lower(step: StepProgram) -> tuple[StepProgram, Lowered]:
    """The step program with its stages fused; weights are shared and the program itself is left as it is."""
    twin = share_tensors(step.graph_module, {})
    report = fuse_stages(twin)
    return replace(step, graph_module=twin), report


def fuse_stages(module: GraphModule) -> Lowered:
    """Applies both rules to every linear attention of a graph, in place."""
    report = Lowered()
    sites = [node for node in module.graph.nodes if is_lincompile_op(node, "linear_attention")]
    for site in sites:
        rules = [(site.args[0], match_features), (site.args[1], match_features), (site.args[3], match_gate)]
        for root, rule in rules:
            if not isinstance(root, Node):
                continue
            root = _past_cast(root)
            try:
                match = rule(root)
                if match is None:
                    continue
                _prove(match)
            except Mismatch as reason:
                report.kept[root.name] = str(reason)
                continue
            _replace(module, match)
            if rule is match_features:
                report.features += 1
            else:
                report.gates += 1
    finish(module)
    return report


# ---- patterns


def match_features(root: Node) -> Match | None:
    """``root``: queries or keys of a linear attention. None where they aren't Hedgehog features at all."""
    node, mask_output = _without_mask(root, heads=True)
    grouped = target_of(node) is aten.flatten.using_ints
    if grouped:
        node = _input(node)
    if target_of(node) is not aten.cat.default:
        return None
    halves = node.args[0]
    if not isinstance(halves, (list, tuple)) or len(halves) != 2 or not _last(argument(node, 1, "dim", 0), node):
        return None
    positive, negative = (op_of(half, aten.softmax.int, "a softmax") for half in halves)
    logits = _input(positive)
    if _input(op_of(_input(negative), aten.neg.default, "a sign change before the second softmax")) is not logits:
        raise Mismatch("the two softmaxes read different logits")
    product, bias = (node_of(item) for item in op_of(logits, aten.add.Tensor, "a bias").args[:2])
    x, weight = (node_of(item) for item in op_of(product, aten.matmul.default, "the map's product").args[:2])
    weight, bias = _attribute(weight, "the map's weight"), _attribute(bias, "the map's bias")
    if grouped:
        x = _input(op_of(x, aten.unflatten.int, "heads in groups"))
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
        conv = _input(conv)
    if not is_lincompile_op(conv, "short_conv"):
        return x, None, None, None, (root, None)
    parts = {user.args[1]: user for user in conv.users}
    if len(parts) != len(conv.users) or 0 not in parts or len(parts[0].users) != 1:
        raise Mismatch("the convolution is read elsewhere, too")
    flat, mask = _without_mask(_input(conv), heads=False)
    flat = op_of(flat, aten.flatten.using_ints, "heads side by side before the convolution")
    source = _input(op_of(_input(flat), aten.transpose.int, "heads side by side before the convolution"))
    state = conv.args[2] if len(conv.args) > 2 else None
    weight = _attribute(node_of(conv.args[1]), "the convolution's weight")
    return source, weight, state if isinstance(state, Node) else None, mask, (root, parts.get(1))


def match_gate(root: Node) -> Match | None:
    """``root``: the log-decays of a linear attention. None where they aren't a projected softplus."""
    node, mask = _without_mask(root, heads=True)
    if target_of(node) is not aten.transpose.int:
        return None
    shaped = _input(node)
    if target_of(shaped) is not aten.unflatten.int:
        return None
    divided = op_of(_input(shaped), aten.div.Tensor, "the gate's temperature")
    temperature = divided.args[1]
    if not isinstance(temperature, (int, float)):
        raise Mismatch("the gate's temperature isn't a number")
    outer = op_of(_input(divided), aten.neg.default, "−softplus(−x)")
    inner = op_of(
        _input(op_of(_input(outer), aten.softplus.default, "−softplus(−x)")), aten.neg.default, "−softplus(−x)"
    )
    linear = op_of(_input(inner), aten.linear.default, "the gate's projection")
    if len(linear.args) < 3:
        raise Mismatch("the gate's projection has no bias")
    z, weight, bias = (node_of(item) for item in linear.args[:3])
    weight, bias = _attribute(weight, "the gate's weight"), _attribute(bias, "the gate's bias")
    sizes = argument(shaped, 2, "sizes")
    if not isinstance(sizes, (list, tuple)) or not isinstance(sizes[0], int) or sizes[0] < 1:
        raise Mismatch("the gate's heads aren't a fixed number")
    kv_heads = sizes[0]

    def call(z: Any, weight: Any, bias: Any, mask: Any) -> tuple[Any, ...]:
        return z, weight, bias, mask, kv_heads, float(temperature)

    return Match(ops.decay_gate.default, (z, weight, bias, mask), (root,), call, 1)


def node_of(item: Any) -> Node:
    """A node where one is wanted, or ``Mismatch``."""
    if not isinstance(item, Node):
        raise Mismatch(f"{item} stands where a tensor was expected")
    return item


def _input(node: Node) -> Node:
    return node_of(node.args[0])


def op_of(node: Any, target: Any, what: str) -> Node:
    """The node if it calls ``target``, or ``Mismatch``: it isn't ``what``."""
    if target_of(node) is not target:
        raise Mismatch(f"'{node}' isn't {what}")
    found: Node = node
    return found


def _last(dim: Any, node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and dim in (-1, value.dim() - 1)


def _attribute(node: Node, what: str) -> Node:
    """A parameter, seen through an axis of length one."""
    while target_of(node) is aten.unsqueeze.default:
        node = _input(node)
    if node.op != "get_attr":
        raise Mismatch(f"{what} is computed or quantized ('{node.name}')")
    return node


def _past_cast(node: Node) -> Node:
    return _input(node) if target_of(node) is aten.to.dtype and isinstance(node.args[0], Node) else node


def _without_mask(node: Node, heads: bool) -> tuple[Node, Node | None]:
    """``node`` without a factor that is a bool mask ``[B, T]``, and that mask."""
    if target_of(node) is not aten.mul.Tensor:
        return node, None
    for value, factor in (node.args[:2], node.args[1::-1]):
        found = factor
        while isinstance(found, Node) and target_of(found) in (aten.unsqueeze.default, aten.to.dtype):
            found = _input(found)
        fake = value_of(found)
        is_mask = isinstance(fake, Tensor) and fake.dtype == torch.bool and fake.dim() == 2
        if is_mask and found is not factor and isinstance(found, Node) and isinstance(value, Node):
            return value, found
    return node, None


# ---- proof and replacement


def _prove(match: Match) -> None:
    """The chain equals the op on random inputs, or ``Mismatch``."""
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(length)
        values = _random_leaves(match, length, generator)
        try:
            have = match.op(*match.call(*values))
        except ValueError as problem:  # the op's own checks of shapes
            raise Mismatch(str(problem)) from problem
        have = have if isinstance(have, tuple) else (have,)
        pairs = zip(match.leaves, values, strict=True)
        known = {node: value for node, value in pairs if node is not None and value is not None}
        for output, result in zip(match.outputs, have, strict=True):
            if output is None:
                continue
            want = evaluate_chain(output, known)
            if want.shape != result.shape:
                raise Mismatch(f"at {length} tokens the chain gives {list(want.shape)}, the op {list(result.shape)}")
            error = float((want - result).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0
            if not error <= TOLERANCE:
                raise Mismatch(f"at {length} tokens the chain and the op differ by {error:.1e}")


def _random_leaves(match: Match, length: int, generator: torch.Generator) -> list[Tensor | None]:
    first = value_of(match.leaves[0])
    if not isinstance(first, Tensor):
        raise Mismatch("the graph carries no shapes")
    sizes = {str(expression(first.shape[0])): 2, str(expression(first.shape[match.time])): length}

    def size(dim: Any) -> int:
        return int(sizes[str(expression(dim))] if str(expression(dim)) in sizes else expression(dim))

    values: list[Tensor | None] = []
    for leaf in match.leaves:
        fake = value_of(leaf)
        if leaf is None:
            values.append(None)
            continue
        if not isinstance(fake, Tensor):
            raise Mismatch("the graph carries no shapes")
        try:
            shape = [size(dim) for dim in fake.shape]
        except TypeError:
            raise Mismatch(f"'{leaf.name}' has a size of its own") from None
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        values.append(random > 0 if fake.dtype == torch.bool else random)
    return values


def evaluate_chain(root: Node, known: dict[Node, Tensor]) -> Tensor:
    """The value of ``root`` computed from the given nodes' values alone, or ``Mismatch``."""
    values: dict[Node, Any] = dict(known)
    pending = [root]
    while pending:
        node = pending[-1]
        missing = [item for item in node.all_input_nodes if item not in values]
        if node in values:
            pending.pop()
        elif node.op != "call_function":
            raise Mismatch(f"the chain also reads '{node.name}'")
        elif missing:
            pending.extend(missing)
        else:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[pending.pop()] = node.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                first = (str(error).splitlines() or [""])[0]
                raise Mismatch(f"'{node.name}' can't be run on small random inputs ({first})") from error
    result: Tensor = values[root]
    return result


def _replace(module: GraphModule, match: Match) -> None:
    root = match.outputs[0]
    assert root is not None
    fakes: Sequence[Any] = [value_of(output) for output in match.outputs]
    with module.graph.inserting_before(root):
        new = module.graph.call_function(match.op, match.call(*match.leaves))
        if len(match.outputs) == 1:
            new.meta["val"] = fakes[0]
            root.replace_all_uses_with(new)
            return
        new.meta["val"] = tuple(fakes)
        for index, output in enumerate(match.outputs):
            if output is None:
                continue
            item = module.graph.call_function(operator.getitem, (new, index))
            item.meta["val"] = fakes[index]
            output.replace_all_uses_with(item)
