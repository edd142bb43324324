"""Makes a model that counts its own positions start counting somewhere else.

Used where a graph sees only a part of a sequence: the step graph (everything so far is in the states) and a
sequence-parallel rank (everything before is on other ranks).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import RefusedError
from ..graph import (
    SHAPE_ONLY,
    Builder,
    argument,
    aten,
    is_symbolic,
    redirect,
    symbols_in,
    target_of,
    tensor_of,
    value_inputs,
    value_of,
)
from ..program import Program, content_nodes
from ..proof.evaluate import Opaque, Sizes, evaluate
from .positional import COUNTERS, axes_of

LONGEST = 12  # length of the tables compared
FAR = (100, 1_000, 5_000)  # and looked at again: they read no data, so that is cheap


def sequence_symbol(tokens: Node) -> str:
    """Name of the size symbol of the sequence axis.

    Raises:
        RefusedError: the captured graph takes sequences of one length only.
    """
    length = tensor_of(tokens).shape[1]
    symbols = symbols_in(length)
    if len(symbols) != 1:
        raise RefusedError(
            f"the captured graph takes exactly {length} tokens (something in the model fixes the length of "
            f"'{tokens.name}'), so it can't read prompts: make that part work at any length"
        )
    return next(iter(symbols))


def continue_positions(program: Program, sequence: str, make_offset: Callable[[], Node]) -> bool:
    """Makes position counters start at an offset instead of 0.

    The size-only tensors that data reads (tables of positions) are found; each must be a prefix-stable function of the
    length; their counters (arange, a cumulated sum of ones, a slice ``table[:T]``) are shifted, and shifted counters
    and tables compared with the originals at offsets. That sees some lengths; for all of them ``mixing`` reads the ops.

    Args:
        program: changed in place.
        sequence: name of the sequence's size symbol.
        make_offset: inserts the node of the offset (a 0-dimensional integer tensor); called only when one is needed.

    Returns:
        Whether there was anything to shift (then all rows of a batch share one offset).

    Raises:
        RefusedError: a table that can't be continued, by name.
    """
    module = program.graph_module
    tables = position_tables(module, sequence)
    if not tables:
        return False
    limit = program.max_positions or FAR[-1]
    longest, *far = sorted({min(length, limit) for length in (LONGEST, *FAR)})
    wanted = {node: _beginning(program, node, sequence, max(1, longest - 5), longest) for node in tables}
    for node in tables:
        with suppress(Opaque, IndexError):  # a table that ends before
            for short, length in pairwise([longest, *far]):
                _beginning(program, node, sequence, short, length)
    offset = make_offset()
    shifted = _shift_counters(module, tables, sequence, offset)

    def at(node: Node, length: int, start: int) -> Tensor:
        value: Tensor = evaluate(module, node, _sizes(program, length), {offset: torch.tensor(start)})
        return value

    for node in dict.fromkeys([*shifted, *tables]):
        new = shifted.get(node, node)
        axis, start = _axis(node, sequence), max(1, longest - 4)
        full = wanted[node] if node in wanted else at(new, longest, 0)
        same = _continues(full, at(new, longest - start, start), axis, start)
        with suppress(Opaque, IndexError):
            for length in far:
                same &= _continues(at(new, length, 0), at(new, length - length // 2, length // 2), axis, length // 2)
        if not same:
            raise RefusedError(f"no step form: the position table '{node.name}' can't be continued from an offset")
    return bool(shifted)


def _sizes(program: Program, length: int) -> Sizes:
    return Sizes(program.bind(batch=2, sequence=length))


def _axis(node: Node, sequence: str) -> int:
    """The axis that a table's positions are along."""
    axes = axes_of(node, sequence)
    if len(axes) != 1:
        raise RefusedError(
            f"no step form: '{node.name}' pairs positions with positions (a mask that wasn't rewritten?)"
        )
    return axes.pop()


def _beginning(program: Program, node: Node, sequence: str, short: int, length: int) -> Tensor:
    """A table at a length. It must begin as the table of a shorter one does.

    Raises:
        RefusedError: it doesn't, or it can't be evaluated (``Opaque`` or ``IndexError`` beyond ``LONGEST``).
    """
    axis = _axis(node, sequence)
    try:
        full, part = (evaluate(program.graph_module, node, _sizes(program, size)) for size in (length, short))
    except Opaque as error:
        if length > LONGEST:
            raise
        raise RefusedError(f"no step form: the position table '{node.name}' can't be evaluated: it {error}") from error
    exact = length <= LONGEST  # the ends of long tensors round differently
    if not _continues(full.narrow(axis, 0, part.shape[axis]), part, axis, 0, exact):
        raise RefusedError(
            f"no step form: the position table '{node.name}' changes with the sequence length (dynamic scaling)"
        )
    assert isinstance(full, Tensor)
    return full


def _continues(full: Tensor, part: Tensor, axis: int, start: int, exact: bool = False) -> bool:
    """Whether a table's end, from ``start``, is ``part``."""
    end = full.narrow(axis, start, full.shape[axis] - start)
    if exact or end.shape != part.shape:
        return torch.equal(end, part)
    part, end = (torch.view_as_real(x) if x.is_complex() else x.float() for x in (part, end))
    return torch.allclose(part, end, atol=1e-6)


def position_tables(module: GraphModule, sequence: str) -> list[Node]:
    """Size-only tensors along the sequence that data-dependent nodes read."""
    depends: dict[Node, bool] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            depends[node] = True
        elif node.op == "get_attr" or is_symbolic(value_of(node)):
            depends[node] = False
        else:
            depends[node] = any(depends[item] for item in value_inputs(node))
    return [
        node
        for node in module.graph.nodes
        if node.op == "call_function"
        and not depends[node]
        and isinstance(value_of(node), Tensor)
        and sequence in symbols_in(value_of(node))
        and any(depends.get(user, True) and target_of(user) not in SHAPE_ONLY for user in node.users)
    ]


def position_limit(program: Program) -> int | None:
    """Longest sequence that tables of learned positions allow: rows of each table that positions alone look up.

    A position t reads row t + c of such a table (c is 2 in some models), so the table ends at length rows − c.
    """
    content = content_nodes(program)
    limits: list[int] = []
    for node in program.graph_module.graph.nodes:
        if target_of(node) is aten.embedding.default and node.args[1] not in content:
            limit = _rows_left(program, node)
            limits += [] if limit is None else [limit]
    return min(limits, default=None)


def _rows_left(program: Program, lookup: Node) -> int | None:
    """Rows of a looked-up table less the row that position 0 reads; None where that can't be told."""
    index = lookup.args[1]
    assert isinstance(index, Node)
    sizes = Sizes(program.bind(batch=2, sequence=3))
    for real in (1, 0):  # before attention is proved nobody knows which of them is a real token in a mask

        def leaf(node: Node, real: int = real) -> Tensor | None:
            item = next(i for i in program.inputs if i.name == node.name)
            shape, dtype = sizes.shape(tensor_of(node)), tensor_of(node).dtype
            if item.role == "positions":
                return torch.arange(shape[-1]).expand(shape)
            return torch.full(shape, real, dtype=dtype) if item.role == "mask" else None

        try:
            rows = evaluate(program.graph_module, index, sizes, leaf=leaf).reshape(-1)
        except Opaque:
            return None
        if rows.numel() >= 3 and torch.equal(rows[:3] - rows[0], torch.arange(3, dtype=rows.dtype)):
            return int(tensor_of(lookup.args[0]).shape[0]) - int(rows[0])
    return None


def _shift_counters(module: GraphModule, tables: list[Node], sequence: str, offset: Node) -> dict[Node, Node]:
    """Adds the offset to every counter above the tables; returns replacements of nodes that were tables themselves."""
    above: set[Node] = set()
    for table in tables:
        pending = [table]
        while pending:
            node = pending.pop()
            if node not in above:
                above.add(node)
                pending.extend(value_inputs(node))
    replaced: dict[Node, Node] = {}
    for node in [n for n in module.graph.nodes if n in above]:
        new = _shifted(module, node, sequence, offset)
        if new is not None:
            redirect(node, new)
            replaced[node] = new
    return replaced


def _shifted(module: GraphModule, node: Node, sequence: str, offset: Node) -> Node | None:
    target = target_of(node)
    counts = target in COUNTERS
    if target is aten.cumsum.default:  # of channels, it counts no tokens
        counts = sequence in symbols_in(tensor_of(node).shape[argument(node, 1, "dim")])
    if counts and sequence in symbols_in(tensor_of(node)):
        return Builder(module, node.next)(aten.add.Tensor, node, offset)
    if target is not aten.slice.Tensor:
        return None
    source, axis = node.args[0], argument(node, 1, "dim", 0)
    assert isinstance(source, Node)
    from_table = sequence not in symbols_in(tensor_of(source).shape[axis])
    along = sequence in symbols_in(tensor_of(node).shape[axis])
    length = argument(node, 3, "end")
    if not (from_table and along and argument(node, 2, "start") in (0, None) and isinstance(length, Node)):
        return None
    make = Builder(module, node.next)
    index = make(aten.add.Tensor, make(aten.arange.default, length, device=tensor_of(source).device), offset)
    return make(aten.index_select.default, source, axis, index)
