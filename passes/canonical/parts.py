"""Turns a tensor that is written slice by slice into the concatenation of its parts, which reads like any other op."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ..graph import (
    INT_MAX,
    Builder,
    argument,
    aten,
    expression,
    is_mutation,
    is_view,
    order_of,
    same_dim,
    target_of,
    tensor_of,
)

EMPTY = frozenset({aten.new_empty.default, aten.empty.memory_format, aten.new_zeros.default, aten.zeros.default})


def assemble_parts(module: GraphModule) -> int:
    """``y = empty(…); y[..., :a] = p; y[..., a:] = q`` → ``cat([p, q])``; returns how many tensors were assembled."""
    order, assembled = order_of(module), 0
    for base in list(module.graph.nodes):
        writes = _writes(base, order) if target_of(base) in EMPTY else []
        parts = _covering(base, writes)
        if not parts:
            continue
        last = max(writes, key=order.__getitem__)
        make = Builder(module, last)
        pieces = [_shaped(make, base, view, source) for view, source in parts]
        whole = make(aten.cat.default, pieces, int(argument(parts[0][0], 1, "dim", 0)))
        for reader in [user for user in base.users if order.get(user, -1) > order[last]]:
            reader.replace_input_with(base, whole)
        for write in writes:
            module.graph.erase_node(write)
        assembled += 1
    if assembled:
        module.graph.eliminate_dead_code()
    return assembled


def _writes(base: Node, order: dict[Node, int]) -> list[Node]:
    """The ``copy_`` into a slice of ``base`` each, if nothing else sees ``base`` before the last of them."""
    views = [user for user in base.users if target_of(user) is aten.slice.Tensor and len(user.users) == 1]
    writes = [next(iter(view.users)) for view in views]
    writes = [w for w in writes if target_of(w) is aten.copy_.default and not w.users and w.args[0] in views]
    written = {w.args[0] for w in writes}
    last = max((order[w] for w in writes), default=0)
    for user in base.users:
        if user not in written and (order[user] < last or is_mutation(user) or _written_later(user)):
            return []
    return writes


def _written_later(node: Node) -> bool:
    """Whether somebody writes into a node or a view of it."""
    return any(is_mutation(user) or (is_view(user) and _written_later(user)) for user in node.users) and is_view(node)


def _covering(base: Node, writes: list[Node]) -> list[tuple[Node, Node]]:
    """(slice, what is written there), ordered, where the slices of one fixed axis cover it without overlap."""
    parts: list[tuple[int, int, Node, Node]] = []
    axes: set[int] = set()
    for write in writes:
        view, source = write.args[0], write.args[1]
        assert isinstance(view, Node)
        axis = int(argument(view, 1, "dim", 0)) % tensor_of(base).dim()
        size = expression(tensor_of(base).shape[axis])
        ends: list[Any] = [argument(view, 2, "start", 0) or 0, argument(view, 3, "end", INT_MAX)]
        if not size.is_Integer or not all(isinstance(end, int) for end in ends) or argument(view, 4, "step", 1) != 1:
            return []
        if not isinstance(source, Node) or _sizes(view, source) is None:
            return []
        start, end = (min(x + int(size) if x < 0 else x, int(size)) for x in ends)
        axes.add(axis)
        parts.append((start, end, view, source))
    parts.sort(key=lambda part: part[0])
    bounds = [0, *(end for _, end, _, _ in parts)]
    if len(axes) != 1 or [start for start, *_ in parts] != bounds[:-1]:
        return []
    whole = int(expression(tensor_of(base).shape[next(iter(axes))]))
    return [(view, source) for _, _, view, source in parts] if bounds[-1] == whole else []


def _sizes(view: Node, source: Node) -> list[int] | None:
    """The sizes that ``expand`` takes from ``source`` to ``view``; None where they aren't numbers."""
    wanted, given = tensor_of(view).shape, tensor_of(source).shape
    sizes: list[int] = []
    for axis, dim in enumerate(wanted):
        at = axis - len(wanted) + len(given)
        if at >= 0 and same_dim(given[at], dim):
            sizes.append(-1)
        elif expression(dim).is_Integer:
            sizes.append(int(dim))
        else:
            return None
    return sizes


def _shaped(make: Builder, base: Node, view: Node, source: Node) -> Node:
    """What ``copy_`` writes: ``source`` in the dtype of ``base`` and the shape of ``view``."""
    dtype, sizes = tensor_of(base).dtype, _sizes(view, source)
    source = source if tensor_of(source).dtype == dtype else make(aten.to.dtype, source, dtype)
    return source if sizes is None or set(sizes) == {-1} else make(aten.expand.default, source, sizes)
