"""Rules of lowering: a pattern proposes, random inputs in float64 decide, and one op takes a chain's place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...passes.graph import expression, on_device, order_of, target_of, value_of
from ...passes.op_kinds import CASTS

LENGTHS = (1, 2, 9)
TOLERANCE = 1e-9
WIDE = 32.0


class Mismatch(Exception):
    """Why a chain isn't the one a rule looks for."""


@dataclass
class Lowered:
    """What was fused, and why the rest was not (by the name of the node that stays)."""

    features: int = 0
    gates: int = 0
    norms: int = 0
    joined: int = 0  # linear layers that became rows of another one
    inputs: int = 0  # linear attentions whose features and gate became one op
    layers: int = 0  # packed layers that took a norm, a gated product or a sum in
    kept: dict[str, str] = field(default_factory=dict)
    proofs: dict[Any, str] = field(default_factory=dict)  # by form, as a model's layers are alike: "" or why not

    def summary(self) -> str:
        """One line for users."""
        text = f"Triton: {self.features} feature chains and {self.gates} gates became one op each"
        if self.norms:
            text += f", {self.norms} norms too"
        if self.joined:
            text += f"; {self.joined} linear layers were joined to others of the same input"
        if self.inputs or self.layers:
            text += f"; for one token, {self.inputs} sites' inputs and {self.layers} packed layers with what is"
            text += " beside them take one kernel each"
        if self.kept:
            first = next(iter(self.kept))
            text += f"; {len(self.kept)} stay as they are ('{first}': {self.kept[first]})"
        return text


@dataclass(frozen=True)
class Match:
    """A chain from ``leaves`` to ``outputs``, and the op that would take its place.

    ``leaves`` are by name, in the op's order, None where absent; the first is the tensor ``[B, …, T, …]`` whose axes
    ``batch`` and ``time`` are. ``call`` takes the leaves (nodes or tensors) to the op's arguments. ``casts``: whether
    the chain's casts are part of what the op computes; without, they only say where it rounds. ``packed``: places of
    leaves that stay of their type, since their bits mean something. ``wide``: places of leaves that are many times as
    large in the proof, so that a floor under what comes of them is reached.
    """

    op: Any
    leaves: tuple[Node | None, ...]
    outputs: tuple[Node | None, ...]
    call: Callable[..., tuple[Any, ...]]
    time: int
    casts: bool = True
    packed: tuple[int, ...] = ()
    wide: tuple[int, ...] = ()


def node_of(item: Any) -> Node:
    """A node where one is wanted, or ``Mismatch``."""
    if not isinstance(item, Node):
        raise Mismatch(f"{item} stands where a tensor was expected")
    return item


def input_of(node: Node) -> Node:
    """The first argument, or ``Mismatch`` where it isn't a node."""
    return node_of(node.args[0])


def op_of(node: Any, target: Any, what: str) -> Node:
    """The node if it calls ``target``, or ``Mismatch``: it isn't ``what``."""
    if target_of(node) is not target:
        raise Mismatch(f"'{node}' isn't {what}")
    found: Node = node
    return found


def prove(match: Match) -> None:
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
            want = evaluate_chain(output, known, match.casts)
            if want.shape != result.shape:
                raise Mismatch(f"at {length} tokens the chain gives {list(want.shape)}, the op {list(result.shape)}")
            error = float((want - result).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0
            if not error <= TOLERANCE:
                raise Mismatch(f"at {length} tokens the chain and the op differ by {error:.1e}")


def _random_leaves(match: Match, length: int, generator: torch.Generator) -> list[Tensor | None]:
    first = value_of(match.leaves[0])
    if not isinstance(first, Tensor):
        raise Mismatch("the graph carries no shapes")
    # Where the program runs: a GPU proves the layers of billions of weights in seconds.
    device = first.device if first.device.type == "cuda" else torch.device("cpu")
    sizes = {str(expression(first.shape[0])): 2, str(expression(first.shape[match.time])): length}

    def size(dim: Any) -> int:
        return int(sizes[str(expression(dim))] if str(expression(dim)) in sizes else expression(dim))

    values: list[Tensor | None] = []
    for index, leaf in enumerate(match.leaves):
        if leaf is None or leaf in match.leaves[:index]:
            values.append(None if leaf is None else values[match.leaves.index(leaf)])
            continue
        fake = value_of(leaf)
        if not isinstance(fake, Tensor):
            raise Mismatch("the graph carries no shapes")
        try:
            shape = [size(dim) for dim in fake.shape]
        except TypeError:
            raise Mismatch(f"'{leaf.name}' has a size of its own") from None
        if index in match.packed and fake.dtype == torch.uint8:
            random = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            kept = fake.dtype if index in match.packed else torch.float64
            random = torch.randn(shape, generator=generator, dtype=torch.float64).to(kept)
        random = random.to(device) * (WIDE if index in match.wide else 1)
        values.append(random > 0 if fake.dtype == torch.bool else random)
    return values


def _form(match: Match) -> Any:
    """What a proof depends on: the chain with its leaves as numbers, and their shapes."""
    names: dict[Node, Any] = {}
    for index, leaf in enumerate(match.leaves):
        if leaf is not None and leaf not in names:
            names[leaf] = index
    # One leaf in two places is another form than two leaves.
    places = tuple(None if leaf is None else names[leaf] for leaf in match.leaves)
    shapes = tuple(
        (tuple(str(expression(dim)) for dim in fake.shape), str(fake.dtype)) if isinstance(fake, Tensor) else None
        for fake in map(value_of, match.leaves)
    )
    pending = [output for output in match.outputs if output is not None][::-1]
    lines: list[str] = []
    while pending:
        node = pending[-1]
        missing = [item for item in node.all_input_nodes if item not in names]
        if node in names:
            pending.pop()
        elif missing:
            pending.extend(missing)
        else:
            args = torch.fx.map_arg((node.args, node.kwargs), lambda item: f"%{names[item]}")
            names[pending.pop()] = len(match.leaves) + len(lines)
            lines.append(f"{node.op} {node.target} {args}")
    outputs = tuple(None if output is None else names[output] for output in match.outputs)
    constants = str(match.call(*(None if leaf is None else f"%{names[leaf]}" for leaf in match.leaves)))
    return match.op, places, shapes, tuple(lines), outputs, constants, match.time, match.casts, match.packed, match.wide


def evaluate_chain(root: Node, known: dict[Node, Tensor], casts: bool = True) -> Tensor:
    """The value of ``root`` computed from the given nodes' values alone, or ``Mismatch``; ``casts``: also cast."""
    values: dict[Node, Any] = dict(known)
    device = next((value.device for value in known.values()), torch.device("cpu"))  # not always the program's
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
            args, kwargs = torch.fx.map_arg(on_device((node.args, node.kwargs), device), values.__getitem__)
            if not casts and node.target in CASTS:
                values[pending.pop()] = args[0]
                continue
            try:
                values[pending.pop()] = node.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                first = (str(error).splitlines() or [""])[0]
                raise Mismatch(f"'{node.name}' can't be run on small random inputs ({first})") from error
    result: Tensor = values[root]
    return result


def fuse(module: GraphModule, root: Node, rule: Callable[[Node], Match | None], report: Lowered) -> bool:
    """Whether the rule's op took the chain's place; where it looked like one and isn't, the report says why."""
    try:
        match = rule(root)
        if match is None:
            return False
        form = _form(match)
        if form not in report.proofs:
            try:
                prove(match)
                report.proofs[form] = ""
            except Mismatch as reason:
                report.proofs[form] = str(reason)
        if report.proofs[form]:
            raise Mismatch(report.proofs[form])
        put(module, match)
    except Mismatch as reason:
        report.kept[root.name] = str(reason)
        return False
    return True


def put(module: GraphModule, match: Match) -> None:
    """The op in the place of the chain, whose nodes are left without users."""
    outputs = [output for output in match.outputs if output is not None]
    order = order_of(module)
    last = max((leaf for leaf in match.leaves if leaf is not None), key=order.__getitem__)
    first = min((user for output in outputs for user in output.users), key=order.__getitem__, default=None)
    if first is not None and order[first] <= order[last]:
        raise Mismatch(f"'{first.name}' reads a part before '{last.name}' is there")
    while last.next.op == "placeholder":
        last = last.next
    fakes: Sequence[Any] = [value_of(output) for output in match.outputs]
    with module.graph.inserting_after(last):
        new = module.graph.call_function(match.op, match.call(*match.leaves))
    if len(match.outputs) == 1:
        new.meta["val"] = fakes[0]
        outputs[0].replace_all_uses_with(new)
        return
    new.meta["val"] = tuple(fakes)
    for index, output in reversed(list(enumerate(match.outputs))):
        if output is None:
            continue
        with module.graph.inserting_after(new):
            item = module.graph.call_function(operator.getitem, (new, index))
        item.meta["val"] = fakes[index]
        output.replace_all_uses_with(item)
