"""Reads how a mask is built from positions, so that probing it at a few places proves it at every length.

Probing alone proves nothing: a window of 4096 looks causal at length 64. Here the ops between positions and scores
are read instead. A mask made of comparisons of whole-number positions is constant between the lines where those
comparisons flip, so its value at the corners of these lines is its value everywhere (``Reading.lines``). A mask read
from a table, or made by other elementwise ops, is known only where it was looked at (``Reading.irregular``), and one
that reads the sequence length, draws random numbers or tells batch rows apart is refused at once (``Unstable``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .evaluate import LOW_PRECISION, Opaque
from .graph import (
    argument,
    aten,
    expression,
    get_attribute,
    is_mutation,
    is_symbolic,
    same_dim,
    target_of,
    tensor_of,
    value_inputs,
    value_of,
)
from .op_kinds import (
    CASTS,
    COMPARISONS,
    ELEMENTWISE_OF_SCORES,
    FILLED,
    ONES,
    OPAQUE_POINTWISE,
    POINTWISE,
    PRODUCTS,
    QUOTIENTS,
    SAME,
    SUMS,
    ZEROS,
)

MAX_VALUES = 64  # distinct numbers of a constant tensor (per-head windows, say) that are told apart


class Unstable(Exception):
    """The scores depend on more than q·k, positions and padding; carries (kind, reason)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


# Positions enter as ``Σ slope · index along axis + offset``; axes count from the right (-1 = keys, -2 = queries).
Slopes = tuple[tuple[int, int], ...]
Line = tuple[Slopes, float]  # where ``Σ slope · index + offset`` changes sign


@dataclass(frozen=True)
class Form:
    """What is known about one node of the slice.

    ``slopes`` and ``offsets``: it is affine in its indices (several offsets: a constant tensor of several values).
    Otherwise its values only change across ``lines``. ``irregular`` names the node after which even that is unknown.
    """

    slopes: Slopes = ()
    offsets: tuple[float, ...] | None = None
    lines: frozenset[Line] = frozenset()
    irregular: str = ""
    from_scores: bool = False
    padding: bool = False

    @property
    def affine(self) -> bool:
        """Whether it is a position along some axis (a plain constant isn't)."""
        return self.offsets is not None and bool(self.slopes)

    @property
    def constant(self) -> bool:
        return self.offsets is not None and not self.slopes


@dataclass
class Reading:
    """What the slice of one candidate is made of.

    ``sources``: nodes that hold positions themselves (``arange`` and the like), by which a probe places positions.
    ``tables``: lengths of the buffers it slices; no position beyond the shortest exists.
    """

    lines: set[Line] = field(default_factory=set)
    irregular: str = ""
    sources: dict[Node, Form] = field(default_factory=dict)
    triangles: list[Node] = field(default_factory=list)
    lookups: list[Node] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)

    @property
    def positional(self) -> bool:
        return bool(self.lines) or bool(self.irregular)


def read(
    module: GraphModule, roots: Iterable[Node], raw: Iterable[Node], roles: Mapping[str, str], static: bool = False
) -> Reading:
    """Reads the slice that ends in ``roots``.

    Args:
        raw: the nodes it starts from: the q·k scores, and the softmax for what comes after it.
        roles: of the inputs it may meet: ``mask`` is padding, ``positions`` and everything else is refused.
        static: the site runs at one length only, so counters of fixed length count positions, not heads.

    Raises:
        Unstable: something in it can't be proved at any set of lengths.
    """
    reader = _Reader(module, set(raw), roles, static)
    try:
        forms = {root: reader.visit(root) for root in roots}
    except Unstable as error:
        if reader.learned and error.kind == "unprovable":
            raise reader.learned_bias() from error
        raise
    if reader.learned:
        raise reader.learned_bias()
    for root, form in forms.items():
        if form.affine:
            form = Form(irregular=f"'{root.name}'")
        reader.reading.lines |= form.lines
        reader.reading.irregular = reader.reading.irregular or form.irregular
    return reader.reading


class _Reader:
    def __init__(self, module: GraphModule, raw: set[Node], roles: Mapping[str, str], static: bool) -> None:
        self.module, self.raw, self.roles, self.static = module, raw, roles, static
        self.reading = Reading()
        self.learned = ""
        self.forms: dict[Node, Form] = {}

    def visit(self, root: Node) -> Form:
        pending = [root]
        while pending:
            node = pending[-1]
            missing = [] if node in self.raw else [item for item in value_inputs(node) if item not in self.forms]
            if node not in self.forms and missing:
                pending.extend(missing)
                continue
            pending.pop()
            if node not in self.forms:
                form = Form(from_scores=True) if node in self.raw else self.form(node)
                self.forms[node] = form
        return self.forms[root]

    def learned_bias(self) -> Unstable:
        return Unstable("learned", f"the parameter '{self.learned}' changes the scores (a learned bias or scale)")

    def of(self, item: Any) -> Form:
        """The form of an argument: a node, or a number."""
        if isinstance(item, Node):
            if is_symbolic(value_of(item)):
                expr = value_of(item).node.expr
                if expr.free_symbols:
                    raise Unstable(
                        "length-dependent", f"the scores depend on the sequence length itself ('{item.name}')"
                    )
                return Form(offsets=(float(expr),))
            return self.forms[item]
        return Form(offsets=(float(item),)) if isinstance(item, (int, float)) else Form()

    def form(self, node: Node) -> Form:
        if node.op == "placeholder":
            role = self.roles.get(node.name)
            if role == "positions":
                raise Unstable(
                    "packed",
                    f"the mask compares the positions in '{node.name}' (packed sequences?); canonical masks count rows",
                )
            if role != "mask":
                raise Opaque(f"reads the input '{node.name}'")
            return Form(padding=True)
        if node.op == "get_attr":
            return self.attribute(node)
        if is_symbolic(value_of(node)):
            return Form()
        target = target_of(node)
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and target is not aten.dropout.default:
            raise Unstable("random", f"the scores are changed by random numbers ('{node.name}')")
        if any(isinstance(value_of(item), Tensor) and self.forms[item].from_scores for item in value_inputs(node)):
            return self.of_scores(node)
        if target in LAYOUTS:
            return LAYOUTS[target](self, node)
        inputs = [
            self.forms[item] for item in value_inputs(node) if item in self.forms and not is_symbolic(value_of(item))
        ]
        if target in SAME:
            return inputs[0]
        if target in CASTS:
            return self.cast(node, inputs[0])
        if target in FILLED or target in ONES or target in ZEROS or target is aten.scalar_tensor.default:
            return self.filled(node)
        if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return self.counter(node)
        if target is aten.cumsum.default:
            return self.accumulated(node)
        if target in (aten.tril.default, aten.triu.default):
            return self.triangle(node)
        if target is aten.index.Tensor:
            return self.lookup(node)
        if target in COMPARISONS:
            return self.comparison(node)
        if target in SUMS or target in PRODUCTS or target in QUOTIENTS:
            return self.arithmetic(node)
        if target in POINTWISE:
            return self.pointwise(node)
        if target in OPAQUE_POINTWISE:
            return self.opaque(node)
        raise Unstable(
            "unprovable",
            f"the mask goes through '{node.name}' ({target}), which isn't known to be the same at every length",
        )

    def of_scores(self, node: Node) -> Form:
        """Ops on the scores themselves: they may be scaled, capped, masked and biased, but not looked at."""
        target = target_of(node)
        reading_condition = (
            target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
            and self.of(node.args[0]).from_scores
        )
        reading_mask = (
            target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and self.of(node.args[1]).from_scores
        )
        scored = [item for item in _operands(node) if isinstance(item, Node) and self.of(item).from_scores]
        allowed = target in ELEMENTWISE_OF_SCORES or target in CASTS or target in SAME or target in LAYOUTS
        if (
            not allowed
            or reading_condition
            or reading_mask
            or (len(scored) > 1 and target not in SUMS)
            or target in (aten.slice.Tensor, aten.select.int)
        ):
            raise Unstable("unknown-scores", f"the scores go through '{node.name}' ({target}) on their way to softmax")
        if target in LAYOUTS:
            return LAYOUTS[target](self, node)
        return replace(self.pointwise(node), from_scores=True)

    # ---- leaves

    def attribute(self, node: Node) -> Form:
        value = get_attribute(self.module, str(node.target))
        if not isinstance(value, Tensor):
            return Form()
        if isinstance(value, torch.nn.Parameter):
            self.learned = self.learned or str(node.target)
            return Form(irregular=f"the parameter '{node.target}'")
        if any(is_mutation(user) for user in node.users):
            raise Unstable("data-dependent", f"the mask reads '{node.target}', which the model changes as it runs")
        if value.is_meta:
            raise Opaque(f"reads '{node.target}', which has no data (meta device)")
        if value.numel() <= 4096:
            distinct = sorted({float(x) for x in value.detach().flatten().tolist()})
            if len(distinct) <= MAX_VALUES:
                return Form(offsets=tuple(distinct))
        return Form(irregular=f"the table '{node.target}'")

    def filled(self, node: Node) -> Form:
        target = target_of(node)
        if target in ONES or target in ZEROS:
            return Form(offsets=(1.0 if target in ONES else 0.0,))
        position = 0 if target is aten.scalar_tensor.default else 1
        return self.of(node.args[position])

    def counter(self, node: Node) -> Form:
        start, step = 0, 1
        if target_of(node) is not aten.arange.default:
            start = node.args[0]  # type: ignore[assignment]
            step = argument(node, 2, "step", 1)
        if isinstance(start, Node):
            start = value_of(start)
            start = int(expression(start)) if expression(start).is_Integer else None  # type: ignore[assignment]
        if not isinstance(start, int) or not isinstance(step, int):
            raise Unstable(
                "length-dependent", f"'{node.name}' counts from a number that depends on the sequence length"
            )
        length = expression(tensor_of(node).shape[0])
        if (
            length.is_Integer and int(length) <= MAX_VALUES and not self.static
        ):  # an index over heads: a few known numbers
            return Form(offsets=tuple(sorted(float(start + step * i) for i in range(int(length)))))
        form = Form(slopes=((-1, step),), offsets=(float(start),))
        self.reading.sources[node] = form
        return self.exact(node, form)

    def accumulated(self, node: Node) -> Form:
        """``cumsum`` of a constant is a position."""
        base = self.of(node.args[0])
        axis = int(node.args[1]) % tensor_of(node).dim() - tensor_of(node).dim()  # type: ignore[arg-type]
        if not base.constant or base.offsets is None or len(base.offsets) != 1 or not base.offsets[0].is_integer():
            return (
                Form(irregular=f"'{node.name}'", padding=base.padding)
                if not base.padding
                else self.refuse_padding(node)
            )
        step = int(base.offsets[0])
        form = Form(slopes=((axis, step),), offsets=(float(step),)) if step else base
        self.reading.sources[node] = form
        return self.exact(node, form)

    def refuse_padding(self, node: Node) -> Form:
        raise Unstable("unprovable", f"'{node.name}' adds up the padding mask, so what a key sees depends on all of it")

    # ---- ops

    def exact(self, node: Node, form: Form) -> Form:
        if form.affine and tensor_of(node).dtype in LOW_PRECISION:
            raise Unstable("unprovable", f"'{node.name}' holds positions in {tensor_of(node).dtype}, which rounds them")
        return form

    def cast(self, node: Node, form: Form) -> Form:
        dtype = tensor_of(node).dtype
        if not form.affine:
            if form.constant and form.offsets is not None and not dtype.is_floating_point:
                whole = (
                    float(bool(x)) if dtype == torch.bool else float(int(x)) for x in form.offsets if abs(x) < 1e300
                )
                return Form(offsets=tuple(sorted(set(whole))))
            return form
        if dtype == torch.bool:
            return Form(lines=_lines(form))
        return (
            self.exact(node, form)
            if dtype in (torch.int64, torch.int32, torch.float32, torch.float64) + LOW_PRECISION
            else self.opaque(node)
        )

    def comparison(self, node: Node) -> Form:
        left, right = self.of(node.args[0]), self.of(node.args[1])
        if left.constant and right.constant and not (left.slopes or right.slopes):
            return self.pointwise(node)
        if (left.affine or left.constant) and (right.affine or right.constant):
            return Form(lines=_lines(_sum(left, right, -1)))
        return self.pointwise(node)

    def arithmetic(self, node: Node) -> Form:
        target = target_of(node)
        left, right = self.of(node.args[0]), self.of(node.args[1])
        if left.offsets is None or right.offsets is None:
            return self.pointwise(node)
        if target in SUMS:
            alpha = argument(node, 2, "alpha", 1)
            return (
                self.exact(node, _sum(left, right, SUMS[target] * alpha))
                if isinstance(alpha, int)
                else self.pointwise(node)
            )
        if target in PRODUCTS and not (left.slopes and right.slopes):
            form, factor = (left, right) if left.slopes else (right, left)
            assert form.offsets is not None and factor.offsets is not None
            if not form.slopes:
                return _several({a * b for a in form.offsets for b in factor.offsets})
            if len(factor.offsets) == 1 and factor.offsets[0].is_integer():
                times = int(factor.offsets[0])
                return self.exact(
                    node,
                    Form(
                        tuple((a, s * times) for a, s in form.slopes if times), tuple(o * times for o in form.offsets)
                    ),
                )
        if target in QUOTIENTS and not left.slopes and not right.slopes:
            return _several({a / b for a in left.offsets for b in right.offsets if b})
        return self.opaque(node) if left.slopes or right.slopes else self.pointwise(node)

    def pointwise(self, node: Node) -> Form:
        """Elementwise in values that change only across lines: so does the result."""
        forms = [self.of(item) for item in _operands(node)]
        if any(form.affine for form in forms):
            return self.opaque(node)
        irregular = next((form.irregular for form in forms if form.irregular), "")
        lines = frozenset().union(*(form.lines for form in forms))
        return Form(lines=lines, irregular=irregular, padding=any(form.padding for form in forms))

    def opaque(self, node: Node) -> Form:
        forms = [self.of(item) for item in _operands(node)]
        positional = any(form.affine or form.lines or form.irregular for form in forms)
        scored = any(form.from_scores for form in forms)
        padding = any(form.padding for form in forms)
        if not positional:
            return Form(padding=padding, from_scores=scored)
        return Form(irregular=f"'{node.name}' ({target_of(node)})", padding=padding, from_scores=scored)

    def triangle(self, node: Node) -> Form:
        base = self.of(node.args[0])
        diagonal = self.of(argument(node, 1, "diagonal", 0)).offsets
        if base.affine or diagonal is None:
            return self.opaque(node)
        self.reading.triangles.append(node)
        edge: Line = (((-2, -1), (-1, 1)), -diagonal[0])
        return Form(lines=base.lines | {edge}, irregular=base.irregular, padding=base.padding)

    def lookup(self, node: Node) -> Form:
        """``mask[rows, columns]`` with the plain positions as indices only rearranges the mask."""
        source, indices = node.args[0], node.args[1]
        assert isinstance(source, Node) and isinstance(indices, (list, tuple))
        base = self.of(source)
        forms = [self.of(item) for item in indices if isinstance(item, Node)]
        if (
            base.padding
            and not base.lines
            and not base.irregular
            and len(forms) == tensor_of(source).dim() == len(indices)
        ):
            axes = set()
            for axis, (item, form) in enumerate(zip(indices, forms, strict=True)):
                if form.offsets != (0.0,) or len(form.slopes) != 1 or form.slopes[0][1] != 1:
                    break
                along = form.slopes[0][0]
                # inputs of one batch may carry different symbols for it; the columns must be the mask's own
                if axis and not same_dim(tensor_of(item).shape[along], tensor_of(source).shape[axis]):
                    break
                axes.add(along)
            else:
                if len(axes) == len(forms):
                    self.reading.lookups.append(node)
                    return Form(padding=True)
        if base.constant and not any(
            form.affine and not _static_axes(form, item) for form, item in zip(forms, indices, strict=False)
        ):
            return Form(offsets=base.offsets)
        if base.padding:
            raise Unstable("unprovable", f"'{node.name}' looks the padding mask up at other places than the key's own")
        return self.opaque(node)


def _static_axes(form: Form, item: Any) -> bool:
    """Whether an index runs over axes of fixed size only (heads)."""
    return all(expression(tensor_of(item).shape[axis]).is_Integer for axis, _ in form.slopes)


def _operands(node: Node) -> list[Any]:
    """Arguments of an elementwise op that are values (its conditions included), not dtypes or devices."""
    flat: list[Any] = []
    for item in [*node.args, *node.kwargs.values()]:
        flat.extend(item if isinstance(item, (list, tuple)) else [item])
    return [item for item in flat if isinstance(item, (Node, int, float)) and not isinstance(item, bool)]


def _sum(left: Form, right: Form, sign: int) -> Form:
    assert left.offsets is not None and right.offsets is not None
    slopes = dict(left.slopes)
    for axis, slope in right.slopes:
        slopes[axis] = slopes.get(axis, 0) + sign * slope
    kept = tuple(sorted((axis, slope) for axis, slope in slopes.items() if slope))
    offsets = {a + sign * b for a in left.offsets for b in right.offsets}
    if len(offsets) > MAX_VALUES or (kept and any(not float(o).is_integer() for o in offsets)):
        return Form(irregular="sums of many constants") if kept else Form()
    return Form(kept, tuple(sorted(offsets)))


def _several(values: set[float]) -> Form:
    return Form(offsets=tuple(sorted(values))) if len(values) <= MAX_VALUES else Form()


def _lines(form: Form) -> frozenset[Line]:
    assert form.offsets is not None
    return frozenset((form.slopes, offset) for offset in form.offsets) if form.slopes else frozenset()


# ---- layout: how the axes of a form move


def _moved(form: Form, move: Callable[[int], int | None]) -> Form:
    """The form with axis ``a`` renamed ``move(a)``; an axis of length one disappears (None)."""

    def rename(slopes: Slopes) -> Slopes:
        return tuple(sorted((new, slope) for axis, slope in slopes if (new := move(axis)) is not None))

    return replace(form, slopes=rename(form.slopes), lines=frozenset((rename(s), o) for s, o in form.lines))


def _unsqueeze(reader: _Reader, node: Node) -> Form:
    rank = tensor_of(node).dim()
    new = int(node.args[1]) % rank - rank  # type: ignore[arg-type]
    return _moved(reader.of(node.args[0]), lambda axis: axis if axis > new else axis - 1)


def _permute(reader: _Reader, node: Node) -> Form:
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


def _same_axes(reader: _Reader, node: Node) -> Form:
    return reader.of(node.args[0])


def _reshape(reader: _Reader, node: Node) -> Form:
    """A reshape that only adds or drops axes of length one, or that touches no axis the form depends on."""
    source = node.args[0]
    assert isinstance(source, Node)
    form, old, new = reader.of(source), tensor_of(source).shape, tensor_of(node).shape
    if not (form.slopes or form.lines or form.irregular or form.padding or form.from_scores):
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
    used = {axis for slopes, _ in (*form.lines, (form.slopes, 0.0)) for axis, _ in slopes}
    if all(axis >= -kept for axis in used):
        return form  # whether batch and heads still fit the padding is for the proof to see
    raise Unstable("unprovable", f"'{node.name}' reshapes the mask in a way that isn't followed")


def _slice(reader: _Reader, node: Node) -> Form:
    source = node.args[0]
    assert isinstance(source, Node)
    form, shape = reader.of(source), tensor_of(source).shape
    axis = int(argument(node, 1, "dim", 0)) % len(shape)
    start, step = argument(node, 2, "start", 0) or 0, argument(node, 4, "step", 1)
    if isinstance(start, Node):
        start = int(expression(value_of(start))) if expression(value_of(start)).is_Integer else None
    if same_dim(shape[axis], tensor_of(node).shape[axis]):
        return form
    if expression(shape[axis]).is_Integer and int(expression(shape[axis])) == 1:
        raise Unstable("unprovable", f"'{node.name}' slices an axis of length 1")
    if start is None or not isinstance(start, int) or start < 0 or step != 1:
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


def _select(reader: _Reader, node: Node) -> Form:
    source, axis, index = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, Node) and isinstance(axis, int)
    form, rank = reader.of(source), tensor_of(source).dim()
    gone = axis % rank - rank
    used = {a for slopes, _ in (*form.lines, (form.slopes, 0.0)) for a, _ in slopes}
    if gone in used or form.padding or form.irregular or not isinstance(index, int):
        raise Unstable("unprovable", f"'{node.name}' takes one row of the mask")
    return _moved(form, lambda a: a if a > gone else a + 1)


def _squeeze(reader: _Reader, node: Node) -> Form:
    source = node.args[0]
    assert isinstance(source, Node)
    rank = tensor_of(source).dim()
    if tensor_of(node).dim() == rank:
        return reader.of(source)
    gone = int(node.args[1]) % rank - rank  # type: ignore[arg-type]
    return _moved(reader.of(source), lambda a: None if a == gone else a if a > gone else a + 1)


LAYOUTS: dict[Any, Callable[[_Reader, Node], Form]] = {
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
