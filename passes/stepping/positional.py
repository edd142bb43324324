"""What a program makes of positions, masks and sizes: which nodes hold them, and what they start from.

A step graph sees positions and mask of its chunk alone, and continues counters that start from sizes. Both are right
only where each entry is made by itself (``tokenwise`` reads that), from something that counts the tokens one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch import Tensor
from torch.fx import Node

from ..graph import (
    SHAPE_ONLY,
    argument,
    aten,
    expression,
    is_symbolic,
    symbols_in,
    target_of,
    tensor_of,
    value_inputs,
    value_of,
    written_nodes,
)
from ..program import Program

COUNTERS = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})
# op → the argument in which a size makes a tensor longer and no number to compute with
SIZES: dict[Any, int] = {
    aten.arange.default: 0,
    aten.arange.start: 1,
    aten.arange.start_step: 1,
    aten.full.default: 0,
    aten.ones.default: 0,
    aten.zeros.default: 0,
    aten.empty.memory_format: 0,
    aten.new_full.default: 1,
    aten.new_ones.default: 1,
    aten.new_zeros.default: 1,
    aten.new_empty.default: 1,
    aten.expand.default: 1,
    aten.repeat.default: 1,
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.unflatten.int: 2,
    aten.slice.Tensor: 3,
}
CREATED = (SHAPE_ONLY - {aten.sym_size.int}) | frozenset(
    {aten.full.default, aten.ones.default, aten.zeros.default, aten.empty.memory_format}
)


def parts_of(node: Any) -> list[Any]:
    """What a node gives: its values, or the one that it is."""
    value = value_of(node)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_long(node: Any, symbol: str) -> bool:
    """Whether a node holds something for every entry of the axis whose size is ``symbol``."""
    return any(isinstance(part, Tensor) and symbol in symbols_in(part) for part in parts_of(node))


def numbers_in(shape: Sequence[Any]) -> sympy.Expr:
    """How many numbers a tensor of this shape holds, expanded, so that equal counts compare equal."""
    return sympy.expand(math.prod((expression(size) for size in shape), start=sympy.Integer(1)))


def axes_of(node: Any, symbol: str) -> set[int]:
    """Axes of a tensor that the symbol is part of, counted from the left."""
    return {axis for axis, dim in enumerate(tensor_of(node).shape) if symbol in symbols_in(dim)}


def token_nodes(program: Program, sequence: str, content: set[Node]) -> set[Node]:
    """Nodes made of tokens, positions, masks, or of sizes along the sequence."""
    return _made_of(program, lambda node: node.op == "placeholder" or is_long(node, sequence) or node in content)


def row_nodes(program: Program, batch: str) -> set[Node]:
    """Nodes made of the tokens, positions or masks of a batch's rows."""
    return _made_of(program, lambda node: node.op == "placeholder" and is_long(node, batch))


def _made_of(program: Program, begins: Callable[[Node], bool]) -> set[Node]:
    """Nodes with values that begin something, and all that is made of them."""
    found: set[Node] = set()
    for node in program.graph_module.graph.nodes:
        if node.op == "get_attr" or is_symbolic(value_of(node)):
            continue
        if begins(node) or any(item in found for item in value_inputs(node)):
            found.add(node)
    return found


def batch_symbols(program: Program) -> list[str]:
    """Size symbols of the inputs' batch axes."""
    shapes = [tensor_of(program.placeholder(item.name)).shape for item in program.inputs if item.axes.get(0) == "batch"]
    return sorted(set().union(*(symbols_in(shape[0]) for shape in shapes)))


def own_counters(program: Program, sequence: str) -> set[Node]:
    """Cumulated sums that count tokens: of a tensor of one number, so that a chunk's can go on from an offset."""
    given: set[Node] = set()  # read from inputs
    varying: set[Node] = set()  # made of sizes, and not the same number at every token
    counters: set[Node] = set()
    written = written_nodes(program.graph_module)
    for node in program.graph_module.graph.nodes:
        if is_symbolic(value_of(node)):
            continue
        inputs, target = value_inputs(node), target_of(node)
        if node.op == "placeholder" or any(item in given for item in inputs):
            given.add(node)
            continue
        summed = target is aten.cumsum.default and _counts(node, sequence)
        if summed and not any(item in varying for item in inputs):
            counters.add(node)
        starts = target in COUNTERS or (target is aten.slice.Tensor and not is_long(node.args[0], sequence))
        varies = summed or node in written or (starts and is_long(node, sequence))
        if varies or any(item in varying for item in inputs):
            varying.add(node)
    return counters


def _counts(node: Node, sequence: str) -> bool:
    axis = int(argument(node, 1, "dim")) % max(tensor_of(node).dim(), 1)
    return axes_of(node, sequence) == {axis} and _of_tokens(node, sequence)


def unknown_start(node: Node, sequence: str) -> str | None:
    """Why a tensor along the sequence, made of sizes, isn't one number, the tokens' numbers or a table's first rows."""
    target = target_of(node)
    if target in CREATED:
        return None
    if target in COUNTERS:
        counts = argument(node, 2, "step", 1) == 1 and _of_tokens(node, sequence)
        return None if counts else "counts something other than tokens"
    if target is aten.slice.Tensor:
        first = argument(node, 2, "start") in (0, None) and argument(node, 4, "step", 1) == 1
        return None if first and _of_tokens(node, sequence) else "takes other rows of a table than the first ones"
    if target in (aten.expand.default, aten.repeat.default):
        shape = tensor_of(node.args[0]).shape
        missing = tensor_of(node).dim() - len(shape)
        same = all(axis < missing or shape[axis - missing] == 1 for axis in axes_of(node, sequence))
        return None if same else "repeats a table along the tokens"
    return "isn't known to make the same of every token, or to count them"


def _of_tokens(node: Node, sequence: str) -> bool:
    """Whether each axis along the sequence has one entry for each token, but for a fixed number of them."""
    sizes = [expression(dim) for dim in tensor_of(node).shape if sequence in symbols_in(dim)]
    symbols = [next(s for s in size.free_symbols if str(s) == sequence) for size in sizes]
    return all((size - symbol).is_Integer for size, symbol in zip(sizes, symbols, strict=True))
