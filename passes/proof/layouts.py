"""How the axes of a form move through reshapes, transposes and slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from ..graph import argument, aten, expression, same_dim, target_of, tensor_of, value_of
from .forms import Form, Slopes, Unstable

if TYPE_CHECKING:
    from .positions import Reader


def _moved(form: Form, move: Callable[[int], int | None]) -> Form:
    """The form with axis ``a`` renamed ``move(a)``; an axis of length one disappears (None)."""

    def rename(slopes: Slopes) -> Slopes:
        return tuple(sorted((new, slope) for axis, slope in slopes if (new := move(axis)) is not None))

    along = frozenset(new for axis in form.along if (new := move(axis)) is not None)
    lines = frozenset((rename(s), o) for s, o in form.lines)
    return replace(form, slopes=rename(form.slopes), lines=lines, along=along)


def _unsqueeze(reader: Reader, node: Node) -> Form:
    rank = tensor_of(node).dim()
    new = int(node.args[1]) % rank - rank  # type: ignore[arg-type]
    return _moved(reader.of(node.args[0]), lambda axis: axis if axis > new else axis - 1)


def _permute(reader: Reader, node: Node) -> Form:
    rank = tensor_of(node).dim()
    if target_of(node) is aten.permute.default:
        order = [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        order = list(range(rank))
        swapped: Any = (0, 1) if target_of(node) in (aten.t.default, aten.numpy_T.default) else node.args[1:3]
        a, b = (int(axis) % rank for axis in swapped)
        if rank >= 2:
            order[a], order[b] = order[b], order[a]
    return _moved(reader.of(node.args[0]), lambda axis: order.index(axis + rank) - rank)


def _same_axes(reader: Reader, node: Node) -> Form:
    return reader.of(node.args[0])


def _reshape(reader: Reader, node: Node) -> Form:
    """A reshape that only adds or drops axes of length one, or that touches no axis the form depends on."""
    source = node.args[0]
    assert isinstance(source, Node)
    form, old, new = reader.of(source), tensor_of(source).shape, tensor_of(node).shape
    if not (form.slopes or form.lines or form.irregular or form.linear or form.padding or form.from_scores):
        return form
    long_old = [i - len(old) for i, n in enumerate(old) if not same_dim(n, 1)]
    long_new = [i - len(new) for i, n in enumerate(new) if not same_dim(n, 1)]
    if len(long_old) == len(long_new) and all(
        same_dim(old[a], new[b]) for a, b in zip(long_old, long_new, strict=True)
    ):
        table = dict(zip(long_old, long_new, strict=True))
        return _moved(form, lambda axis: table.get(axis))
    # leading axes (batch, heads) merged or split: the trailing axes that match keep their names
    kept = 0
    while kept < min(len(old), len(new)) and same_dim(old[-1 - kept], new[-1 - kept]):
        kept += 1
    used = form.axes | {axis for slopes, _ in form.lines for axis, _ in slopes}
    if all(axis >= -kept for axis in used):
        return form  # whether batch and heads still fit the padding is for the proof to see
    raise Unstable("unprovable", f"'{node.name}' reshapes the mask in a way that isn't followed")


def _slice(reader: Reader, node: Node) -> Form:
    source = node.args[0]
    assert isinstance(source, Node)
    form, shape = reader.of(source), tensor_of(source).shape
    axis = int(argument(node, 1, "dim", 0)) % len(shape)
    start, step = argument(node, 2, "start", 0) or 0, argument(node, 4, "step", 1)
    if isinstance(start, Node):
        start = int(expression(value_of(start))) if expression(value_of(start)).is_Integer else None
    if same_dim(shape[axis], tensor_of(node).shape[axis]):
        return form
    if expression(tensor_of(node).shape[axis]).is_Integer and not (form.positional or form.padding or form.from_scores):
        return form  # some of the heads
    if start is None:
        return _tail(reader, node, form, axis)
    if expression(shape[axis]).is_Integer and int(expression(shape[axis])) == 1:
        raise Unstable("unprovable", f"'{node.name}' slices an axis of length 1")
    if not isinstance(start, int) or start < 0 or step != 1:
        raise Unstable(
            "length-dependent", f"'{node.name}' takes a part of the mask that depends on the sequence length"
        )
    if not expression(shape[axis]).is_Integer:
        raise Unstable("unprovable", f"'{node.name}' takes a part of a mask that grows with the sequence")
    if form.padding or form.from_scores:
        raise Unstable("unprovable", f"'{node.name}' takes a part of the padding mask or of the scores")
    reader.reading.tables.append(int(expression(shape[axis])) - start)
    from_right = axis - len(shape)
    if form.affine:
        assert form.offsets is not None
        shift = start * dict(form.slopes).get(from_right, 0)
        moved = replace(form, offsets=tuple(offset + shift for offset in form.offsets))
        reader.reading.sources[node] = moved
        return moved
    if form.constant and form.offsets is not None and len(form.offsets) == 1:
        return form
    return Form(irregular=f"the table '{source.name}'")


def _tail(reader: Reader, node: Node, form: Form, axis: int) -> Form:
    """The last positions of a table that is linear in them: as a bias, that is the table from its start.

    The whole of the longest sequence is looked at instead of places far away.
    """
    source = node.args[0]
    assert isinstance(source, Node)
    length = expression(tensor_of(source).shape[axis])
    grows = form.affine or bool(form.linear)
    if not grows or not length.is_Integer or argument(node, 4, "step", 1) != 1 or form.lines or form.padding:
        raise Unstable(
            "length-dependent", f"'{node.name}' takes a part of the mask that depends on the sequence length"
        )
    reader.reading.tables.append(int(length))
    reason = f"'{node.name}' takes the last positions of a table, how many depends on the sequence length"
    return Form(
        irregular=f"the table '{source.name}'",
        linear=form.linear or f"'{source.name}'",
        along=form.axes,
        relative=("length-dependent", reason),
    )


def _select(reader: Reader, node: Node) -> Form:
    source, axis, index = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, Node) and isinstance(axis, int)
    form, rank = reader.of(source), tensor_of(source).dim()
    gone = axis % rank - rank
    used = form.axes | {axis for slopes, _ in form.lines for axis, _ in slopes}
    if gone in used or form.padding or form.irregular or not isinstance(index, int):
        raise Unstable("unprovable", f"'{node.name}' takes one row of the mask")
    return _moved(form, lambda a: a if a > gone else a + 1)


def _squeeze(reader: Reader, node: Node) -> Form:
    source = node.args[0]
    assert isinstance(source, Node)
    rank = tensor_of(source).dim()
    if tensor_of(node).dim() == rank:
        return reader.of(source)
    gone = int(node.args[1]) % rank - rank  # type: ignore[arg-type]
    return _moved(reader.of(source), lambda a: None if a == gone else a if a > gone else a + 1)


LAYOUTS: dict[Any, Callable[[Reader, Node], Form]] = {
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.t.default: _permute,
    aten.numpy_T.default: _permute,
    aten.expand.default: _same_axes,
    aten.expand_as.default: _same_axes,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}
