"""Ops that torch has under two names, under one: a matcher, a printer or a kernel then needs to know only that one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph import aten, target_of, tensor_of

# By torch's own documentation each of these is an alias, of the op whose name follows.
NAMES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "fix": "trunc",
    "special_expit": "sigmoid",
    "special_exp2": "exp2",
    "special_expm1": "expm1",
    "special_log1p": "log1p",
    "special_logsumexp": "logsumexp",
    "special_softmax": "softmax",
}


# Not an alias, but the same for what it can be given.
CASES = {aten.broadcast_to.default: aten.expand.default}


def _kinds(op: torch._ops.OpOverload) -> list[tuple[str, bool]]:
    return [(str(argument.type), argument.kwarg_only) for argument in op._schema.arguments]


def _twins() -> dict[Any, Any]:
    """Each overload of a second name, and the overload of the first that takes the same arguments."""
    twins = {}
    for name, first in [*NAMES.items(), *((f"{name}_", f"{first}_") for name, first in NAMES.items())]:
        packet, other = getattr(aten, name, None), getattr(aten, first, None)
        if packet is None or other is None:  # not all have a form in place
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            same = [found for o in other.overloads() if _kinds(found := getattr(other, o)) == _kinds(op)]
            if same:
                twins[op] = same[0]
    return twins


TWINS = _twins()
MOVES = frozenset({aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist})
TRANSPOSES = frozenset({aten.mT.default, aten.mH.default, aten.adjoint.default})  # of what isn't complex


def _as_permutation(node: Node) -> None:
    """Makes ``movedim`` the ``permute`` that it is."""
    rank = tensor_of(node).dim()
    places: tuple[Any, ...] = node.args[1:]
    source, destination = ([at] if isinstance(at, int) else list(at) for at in places)
    taken = {to % rank: origin % rank for origin, to in zip(source, destination, strict=True)}
    rest = iter(axis for axis in range(rank) if axis not in taken.values())
    order = [taken[axis] if axis in taken else next(rest) for axis in range(rank)]
    node.target, node.args = aten.permute.default, (node.args[0], order)


def respell(module: GraphModule) -> int:
    """Gives ops their first name, and those that are a case of another op that one's; returns how many it changed."""
    changed = 0
    for node in module.graph.nodes:
        target = target_of(node)
        if target in MOVES:
            _as_permutation(node)
        elif target in TRANSPOSES and not tensor_of(node).is_complex():
            node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)
        elif target is aten.tile.default:
            source, times = node.args
            ones = [1] * (tensor_of(source).dim() - len(times))
            node.target, node.args = aten.repeat.default, (source, [*ones, *times])
        elif target in CASES:
            node.target = CASES[target]
        elif (twin := TWINS.get(target)) is not None:
            own, wanted = target._schema.arguments, twin._schema.arguments
            renamed = {argument.name: new.name for argument, new in zip(own, wanted, strict=True)}
            node.kwargs = {renamed[name]: value for name, value in node.kwargs.items()}
            node.target = twin
        else:
            continue
        changed += 1
    return changed
