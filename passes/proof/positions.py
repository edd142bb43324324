"""Reads how a mask is built from positions, so that probing it at a few places proves it at every length.

Probing alone proves nothing: a window of 4096 looks causal at length 64. Here the ops between positions and scores
are read instead. A mask made of comparisons of whole-number positions is constant between the lines where those
comparisons flip, so its value at the corners of these lines is its value everywhere (``Reading.lines``). A mask read
from a table, or made by other elementwise ops, is known only where it was looked at (``Reading.irregular``), and one
that reads the sequence length, draws random numbers or tells batch rows apart is refused at once (``Unstable``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph import (
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
from ..op_kinds import (
    CASTS,
    COMPARISONS,
    ELEMENTWISE_OF_SCORES,
    FILLED,
    JOINS,
    LINEAR,
    ONES,
    OPAQUE_POINTWISE,
    POINTWISE,
    PRODUCTS,
    QUOTIENTS,
    SAME,
    SUMS,
    ZEROS,
)
from .evaluate import LOW_PRECISION, Opaque
from .forms import MAX_VALUES, Form, Line, Reading, Unstable, crossing, lines_of, several, sum_of
from .layouts import LAYOUTS


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
    reader = Reader(module, set(raw), roles, static)
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
        reader.reading.linear = reader.reading.linear or bool(form.linear)
        reader.reading.irregular = reader.reading.irregular or form.irregular
    return reader.reading


class Reader:
    """Visits a slice from its leaves up and says of each node what is known about its values."""

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
                        "length-dependent",
                        f"the scores depend on the sequence length (or the batch size) itself ('{item.name}')",
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
        if isinstance(value_of(node), (int, float)):  # the size of an axis that is fixed
            return Form(offsets=(float(value_of(node)),))
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
        if target in JOINS and not any(form.positional or form.padding for form in inputs):
            return Form()  # the slopes of a number of heads that isn't a power of two, say
        if target in COMPARISONS:
            return self.comparison(node)
        if target in SUMS or target in PRODUCTS or target in QUOTIENTS:
            return self.arithmetic(node)
        if target is aten.abs.default:
            return self.magnitude(node)
        if target in POINTWISE or target in OPAQUE_POINTWISE:
            return self.pointwise(node)
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
        scored = [
            item
            for item in _operands(node)
            if isinstance(item, Node) and not is_symbolic(value_of(item)) and self.of(item).from_scores
        ]
        allowed = target in ELEMENTWISE_OF_SCORES or target in CASTS or target in SAME or target in LAYOUTS
        if (
            not allowed
            or reading_condition
            or reading_mask
            or (len(scored) > 1 and target not in SUMS)
            or target in (aten.slice.Tensor, aten.select.int)
        ):
            raise Unstable(
                "unknown-scores",
                f"the scores or probabilities go through '{node.name}' ({target}), no scale, cap, mask or bias",
            )
        if target in LAYOUTS:
            return LAYOUTS[target](self, node)
        factors = [self.of(item) for item in _operands(node) if item not in scored]
        if (target in PRODUCTS or target in QUOTIENTS) and any(form.affine or form.linear for form in factors):
            return replace(self.opaque(node), from_scores=True)  # a scale that grows with positions
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
            start = int(expression(start)) if expression(start).is_Integer else start
        start, step = _whole(start), _whole(step)
        if is_symbolic(start) and isinstance(step, int):  # a shift of all positions, which no linear bias shows
            self.reading.sources[node] = Form(slopes=((-1, step),), offsets=(0.0,))
            reason = f"'{node.name}' counts from a number that depends on the sequence length"
            along = frozenset({-1})
            return self.exact(node, Form(linear=f"'{node.name}'", along=along, relative=("length-dependent", reason)))
        if not isinstance(start, int) or not isinstance(step, int):
            raise Unstable(
                "length-dependent", f"'{node.name}' counts from a number that depends on the sequence length"
            )
        length = expression(tensor_of(node).shape[0])
        if length.is_Integer and int(length) <= MAX_VALUES and not self.static:  # an index over heads: known numbers
            return Form(offsets=tuple(sorted(float(start + step * i) for i in range(int(length)))))
        form = Form(slopes=((-1, step),), offsets=(float(start),))
        self.reading.sources[node] = form
        return self.exact(node, form)

    def accumulated(self, node: Node) -> Form:
        """``cumsum`` of a constant is a position."""
        base = self.of(node.args[0])
        axis = int(node.args[1]) % tensor_of(node).dim() - tensor_of(node).dim()  # type: ignore[arg-type]
        if base.padding and not base.lines and not base.irregular:
            self.reading.sources[node] = Form(slopes=((axis, 1),), offsets=(1.0,))  # as it counts without padding
            self.reading.counted = True
            reason = f"'{node.name}' adds up the padding mask, so what a key sees depends on all of it"
            along = frozenset({axis})
            return self.exact(
                node, Form(linear=f"'{node.name}'", along=along, relative=("unprovable", reason), padding=True)
            )
        if not base.constant or base.offsets is None or len(base.offsets) != 1 or not base.offsets[0].is_integer():
            return Form(irregular=f"'{node.name}'", padding=base.padding)
        step = int(base.offsets[0])
        form = Form(slopes=((axis, step),), offsets=(float(step),)) if step else base
        self.reading.sources[node] = form
        return self.exact(node, form)

    # ---- ops

    def exact(self, node: Node, form: Form) -> Form:
        if (form.affine or form.linear) and tensor_of(node).dtype in LOW_PRECISION:
            raise Unstable("unprovable", f"'{node.name}' holds positions in {tensor_of(node).dtype}, which rounds them")
        return form

    def cast(self, node: Node, form: Form) -> Form:
        dtype = tensor_of(node).dtype
        if form.linear:
            return self.exact(node, form) if dtype.is_floating_point else self.opaque(node)
        if not form.affine:
            if form.constant and form.offsets is not None and not dtype.is_floating_point:
                whole = (
                    float(bool(x)) if dtype == torch.bool else float(int(x)) for x in form.offsets if abs(x) < 1e300
                )
                return Form(offsets=tuple(sorted(set(whole))))
            return form
        if dtype == torch.bool:
            return crossing(form)
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
            return crossing(sum_of(left, right, -1))
        return self.pointwise(node)

    def arithmetic(self, node: Node) -> Form:
        target = target_of(node)
        left, right = self.of(node.args[0]), self.of(node.args[1])
        if left.offsets is None or right.offsets is None:
            return self.pointwise(node)
        if target in SUMS:
            alpha = argument(node, 2, "alpha", 1)
            return (
                self.exact(node, sum_of(left, right, SUMS[target] * alpha))
                if isinstance(alpha, int)
                else self.pointwise(node)
            )
        if target in PRODUCTS and not (left.slopes and right.slopes):
            form, factor = (left, right) if left.slopes else (right, left)
            assert form.offsets is not None and factor.offsets is not None
            if not form.slopes:
                return several({a * b for a in form.offsets for b in factor.offsets})
            if len(factor.offsets) == 1 and factor.offsets[0].is_integer():
                times = int(factor.offsets[0])
                return self.exact(
                    node,
                    Form(
                        tuple((a, s * times) for a, s in form.slopes if times), tuple(o * times for o in form.offsets)
                    ),
                )
        if target in QUOTIENTS and not left.slopes and not right.slopes:
            return several({a / b for a in left.offsets for b in right.offsets if b})
        return self.pointwise(node)

    def pointwise(self, node: Node) -> Form:
        """Elementwise in values that change only across lines: so does the result. Sums may be linear between them."""
        forms = [self.of(item) for item in _operands(node)]
        grows = any(form.affine or form.linear for form in forms)
        if grows and not _stays_linear(target_of(node), forms):
            return self.opaque(node)
        irregular = next((form.irregular for form in forms if form.irregular), "")
        lines = frozenset().union(*(form.lines for form in forms))
        origin = next((form.linear for form in forms if form.linear), f"'{node.name}' ({target_of(node)})")
        padding = any(form.padding for form in forms)
        result = Form(lines=lines, irregular=irregular, padding=padding)
        if not grows:
            return result
        along = frozenset().union(*(form.axes for form in forms))
        relative = next((form.relative for form in forms if form.relative), None)
        return self.exact(node, replace(result, linear=origin, along=along, relative=relative))

    def magnitude(self, node: Node) -> Form:
        """``abs`` of a position is linear on either side of where it changes sign."""
        form = self.of(node.args[0])
        if not form.affine:
            return self.opaque(node)
        return self.exact(
            node, Form(lines=lines_of(form), linear=f"'{node.name}' ({target_of(node)})", along=form.axes)
        )

    def opaque(self, node: Node) -> Form:
        forms = [self.of(item) for item in _operands(node)]
        relative = next((form.relative for form in forms if form.relative), None)
        if relative is not None:
            raise Unstable(*relative)
        positional = any(form.positional for form in forms)
        origin = next((form.irregular or form.linear for form in forms if form.irregular or form.linear), "")
        scored = any(form.from_scores for form in forms)
        padding = any(form.padding for form in forms)
        if not positional:
            return Form(padding=padding, from_scores=scored)
        return Form(irregular=origin or f"'{node.name}' ({target_of(node)})", padding=padding, from_scores=scored)

    def triangle(self, node: Node) -> Form:
        base = self.of(node.args[0])
        diagonal = self.of(argument(node, 1, "diagonal", 0)).offsets
        if base.affine or diagonal is None:
            return self.opaque(node)
        self.reading.triangles.append(node)
        edge: Line = (((-2, -1), (-1, 1)), -diagonal[0])
        return replace(base, lines=base.lines | {edge}, offsets=None)

    def lookup(self, node: Node) -> Form:
        """``mask[rows, columns]`` with the plain positions as indices only rearranges the mask."""
        source, indices = node.args[0], node.args[1]
        assert isinstance(source, Node) and isinstance(indices, (list, tuple))
        base = self.of(source)
        given = [item for item in indices if isinstance(item, Node)]
        forms = [self.of(item) for item in given]
        if any(form.padding for form in forms):
            raise Unstable("unprovable", f"'{node.name}' looks a table up by the padding mask")
        if (
            base.padding
            and not base.lines
            and not base.irregular
            and len(given) == tensor_of(source).dim() == len(indices)
        ):
            axes = set()
            for axis, (item, form) in enumerate(zip(given, forms, strict=True)):
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
        if base.constant and all(_picks_heads(form, item) for form, item in zip(forms, given, strict=True)):
            return Form(offsets=base.offsets)
        if base.padding:
            raise Unstable("unprovable", f"'{node.name}' looks the padding mask up at other places than the key's own")
        return self.opaque(node)


def _stays_linear(target: Any, forms: list[Form]) -> bool:
    """Whether an op of these operands is linear in positions (between lines) where each of them is."""
    if target in SUMS or target in LINEAR:
        return True
    growing = [form.affine or bool(form.linear) for form in forms]
    return (target in PRODUCTS and sum(growing) == 1) or (target in QUOTIENTS and not growing[1])


def _whole(number: Any) -> Any:
    """A float that holds a whole number as an int, anything else unchanged."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _picks_heads(form: Form, item: Node) -> bool:
    """Whether an index is made of constants and of counters along axes of fixed size (heads) only."""
    fixed = all(expression(tensor_of(item).shape[axis]).is_Integer for axis, _ in form.slopes)
    return form.offsets is not None and fixed


def _operands(node: Node) -> list[Any]:
    """Arguments of an elementwise op that are values (its conditions included), not dtypes or devices."""
    flat: list[Any] = []
    for item in [*node.args, *node.kwargs.values()]:
        flat.extend(item if isinstance(item, (list, tuple)) else [item])
    return [item for item in flat if isinstance(item, (Node, int, float)) and not isinstance(item, bool)]
