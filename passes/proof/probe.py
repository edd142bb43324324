"""Evaluates what stands between q·k and p·v at one attention candidate, at chosen lengths and at chosen positions.

A ``Probe`` runs the candidate's score chain and masks, never the model. ``observe`` looks at every pair of positions
of a short sequence; ``observe_far`` looks at chosen pairs out to ``HORIZON`` by putting those positions where the
graph counts them, which is sound for masks that ``positions.read`` understood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph import argument, aten, expression, same_dim, symbols_in, target_of, tensor_of, value_inputs, value_of
from ..program import Program
from .evaluate import Evaluation, Opaque, Sizes, evaluate
from .forms import Form, Reading, Unstable
from .match import Candidate
from .positions import read

MASKED = -9000.0  # additive masks in use start at −1e4
HORIZON = 1 << 24  # positions are looked at up to here: float32 counts no further, and no model reads longer


@dataclass
class Observation:
    """What the chain does between query positions ``rows`` and key positions ``columns`` (both ``[n]``).

    ``allowed`` and ``bias`` are ``[B, H, rows, columns]``: which keys a query sees, and what is added to their scores.
    """

    allowed: Tensor
    bias: Tensor
    rows: Tensor
    columns: Tensor


@dataclass
class View:
    """What a probe looks at: sizes, the positions along both axes, values given to nodes, and to mask inputs."""

    sizes: Sizes
    rows: Tensor
    columns: Tensor
    env: dict[Node, Any] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Response:
    """How scores answer: ``scale·x``, or ``softcap·tanh(scale·x / softcap)`` where the softcap isn't 0."""

    scale: float
    softcap: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.softcap * torch.tanh(self.scale * x / self.softcap) if self.softcap else self.scale * x


@dataclass
class Probe:
    """Evaluates one candidate's score chain at chosen lengths."""

    program: Program
    candidate: Candidate
    inverted: dict[str, bool] = field(default_factory=dict)  # mask inputs where 1 means padding

    def __post_init__(self) -> None:
        q, k = tensor_of(self.candidate.q), tensor_of(self.candidate.k)
        scores = self.candidate.scores
        if scores is not None:
            self.rows, self.columns = tensor_of(scores).shape[-2:]
        else:
            self.rows, self.columns = q.shape[-2], k.shape[-2]
        self.same_length = same_dim(self.rows, self.columns)
        self.static = not symbols_in(self.rows) and not symbols_in(self.columns)

    def sizes(self, length: int, batch: int = 2, other: int = 2) -> Sizes:
        """Binds the symbols: rows to ``length``, other sequences to ``length + other``, the rest to ``batch``."""
        binding: dict[str, int] = {}
        row_symbols = symbols_in(self.rows) or symbols_in(self.columns)
        for item in self.program.inputs:
            fake = tensor_of(self.program.placeholder(item.name))
            for axis, dim in enumerate(fake.shape):
                free = symbols_in(dim)
                if len(free) == 1:
                    symbol = next(iter(free))
                    named = item.axes.get(axis, "batch")
                    wanted = length if symbol in row_symbols else batch if named == "batch" else length + other
                    binding.setdefault(symbol, wanted)
        return Sizes(binding)

    def leaf(self, sizes: Sizes, masks: dict[str, Tensor] | None = None) -> Any:
        """Values for placeholders: masks (all ones unless given); anything else is data, not to be read."""

        def value(node: Node) -> Tensor | None:
            fake = tensor_of(node)
            if masks and node.name in masks:
                return masks[node.name].to(fake.dtype)
            if self.is_mask(node):
                return torch.full(sizes.shape(fake), 0 if self.inverted.get(node.name) else 1).to(fake.dtype)
            return None

        return value

    def is_mask(self, node: Node) -> bool:
        fake = tensor_of(node)
        item = next(i for i in self.program.inputs if i.name == node.name)
        return fake.dim() == 2 and (item.role == "mask" or (item.role == "other" and fake.dtype == torch.bool))

    def scores(self, view: View, raw: Tensor, record: Evaluation | None = None) -> Tensor:
        """The softmax's input (float32) as a function of the raw contraction ``raw``."""
        module, candidate = self.program.graph_module, self.candidate
        leaf = self.leaf(view.sizes, view.masks)
        if candidate.softmax is not None:
            assert candidate.scores is not None
            env = {**view.env, candidate.scores: raw}
            if target_of(candidate.scores) is aten.baddbmm.default:
                beta, alpha = (float(candidate.scores.kwargs.get(name, 1)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
                base = evaluate(module, candidate.scores.args[0], view.sizes, view.env, leaf, record) if beta else 0.0  # type: ignore[arg-type]
                env[candidate.scores] = beta * base + alpha * raw
            source = candidate.softmax.args[0]
            assert isinstance(source, Node)
            result: Tensor = evaluate(module, source, view.sizes, env, leaf, record)
            return result.float()
        scale = candidate.scale if candidate.scale is not None else 1 / math.sqrt(int(tensor_of(candidate.q).shape[-1]))
        result = raw * scale
        if candidate.mask is not None:
            mask = evaluate(module, candidate.mask, view.sizes, view.env, leaf, record)
            result = result.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else result + mask
        if candidate.is_causal:
            result = result.masked_fill(view.columns[None, :] > view.rows[:, None], -math.inf)
        return result

    def weights(self, view: View, probabilities: Tensor, record: Evaluation | None = None) -> Tensor:
        """What multiplies v, as a function of the softmax's output."""
        candidate = self.candidate
        assert candidate.weights is not None and candidate.softmax is not None
        env = {**view.env, candidate.softmax: probabilities}
        leaf = self.leaf(view.sizes, view.masks)
        result: Tensor = evaluate(self.program.graph_module, candidate.weights, view.sizes, env, leaf, record)
        return result

    def raw_shape(self, sizes: Sizes) -> list[int]:
        if self.candidate.scores is not None:
            return sizes.shape(tensor_of(self.candidate.scores))
        q, k = sizes.shape(tensor_of(self.candidate.q)), sizes.shape(tensor_of(self.candidate.k))
        return [*q[:-1], k[-2]]

    def roots(self) -> list[Node]:
        """Where the slice ends: the softmax's input or SDPA's mask, and what multiplies v."""
        candidate = self.candidate
        if candidate.softmax is None:
            return [candidate.mask] if candidate.mask is not None else []
        ends = [candidate.softmax.args[0], candidate.weights]
        if candidate.scores is not None and target_of(candidate.scores) is aten.baddbmm.default:
            ends.append(candidate.scores.args[0])
        return [node for node in ends if isinstance(node, Node)]

    def slice_nodes(self) -> list[Node]:
        """Nodes of the score chain and of the masks that feed it (the raw contraction excluded)."""
        seen: set[Node] = {node for node in (self.candidate.scores, self.candidate.softmax) if node is not None}
        found: list[Node] = []
        pending = [root for root in self.roots() if root not in seen]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            found.append(node)
            pending.extend(value_inputs(node))
        return found

    def read(self) -> Reading:
        """How the slice is built from positions. Raises ``Unstable`` or ``Opaque`` where that can't be known."""
        roles = {item.name: item.role for item in self.program.inputs}
        roles |= {name: "mask" for name in roles if self.is_mask(self.program.placeholder(name))}
        raw = [node for node in (self.candidate.scores, self.candidate.softmax) if node is not None]
        return read(self.program.graph_module, self.roots(), raw, roles, self.static)


def _four_axes(values: Tensor) -> Tensor:
    if values.dim() == 3:
        return values.unsqueeze(0)
    return values.flatten(1, 2) if values.dim() == 5 else values


def allowed_keys(probe: Probe, view: View, real: Tensor | None = None) -> Tensor:
    """Which keys each query sees, bool ``[B, H, T, S]``.

    Raises:
        Unstable: ``real`` tokens ``[B, T]`` are given, and their probabilities don't reach v as they are.
    """
    allowed = probe.scores(view, torch.zeros(probe.raw_shape(view.sizes))) > MASKED
    if real is not None:
        check_weights(probe, view, allowed, real if probe.same_length else None)
    return _four_axes(allowed)


def observe(probe: Probe, view: View, response: Response, record: Evaluation) -> Observation:
    """Looks at every pair of the view's positions.

    Raises:
        Unstable: the scores answer otherwise than ``response`` somewhere, or probabilities change after softmax.
    """
    full = probe.raw_shape(view.sizes)
    shape = [1, 1, *full[2:]] if len(full) == 4 and full[-1] * full[-2] > 1 << 14 else full
    try:
        values = probe.scores(view, torch.zeros(shape), record)
    except Opaque:
        if shape == full:
            raise
        shape = full  # the chain doesn't broadcast over batch and heads
        values = probe.scores(view, torch.zeros(shape), record)
    allowed = values > MASKED
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3
    answer = probe.scores(view, x) - values
    wanted = response(x)
    if answer.dim() != x.dim():
        wanted = wanted.reshape(answer.shape)
    wanted = wanted.expand_as(answer)
    close = (answer - wanted).abs() <= 1e-4 + 1e-3 * wanted.abs() + 5e-7 * values.abs()  # a bias rounds them
    if not bool((close | ~allowed).all()):
        raise Unstable("unknown-scores", "the scores are scaled differently at different positions")
    check_weights(probe, view, allowed, record=record)
    bias = torch.where(allowed, values, torch.zeros(()))
    return Observation(_four_axes(allowed), _four_axes(bias), view.rows, view.columns)


def check_weights(
    probe: Probe, view: View, allowed: Tensor, real: Tensor | None = None, record: Evaluation | None = None
) -> None:
    """Probabilities must reach v as they leave the softmax (0 at masked keys).

    Args:
        allowed: which keys each query sees, bool, in the shape of the scores or one that expands to it.
        real: the real tokens ``[B, T]``, where queries of padding are nobody's result.
    """
    candidate = probe.candidate
    if candidate.softmax is None or candidate.weights is candidate.softmax:
        return
    shape = view.sizes.shape(tensor_of(candidate.softmax))
    generator = torch.Generator().manual_seed(5)
    p = torch.pow(10.0, -30 * torch.rand(shape, generator=generator) ** 2)  # a clamp may act on small ones alone
    p = p.where(torch.rand(shape, generator=generator) > 0.1, 1.0) * allowed.expand(shape)
    seen = probe.weights(view, p, record)
    if seen.numel() == p.numel():
        seen = seen.float().reshape(p.shape)
        if real is not None and shape[-2] == real.shape[1]:
            rows = real.reshape(real.shape[0], *([1] * (len(shape) - 3)), -1, 1)
            rows = real.repeat_interleave(shape[0] // len(real), 0)[..., None] if len(shape) == 3 else rows
            p, seen = p * rows, seen * rows
        if torch.allclose(seen, p, rtol=1e-6, atol=0):
            return
    raise Unstable("post-softmax", "the probabilities are changed between softmax and p·v")


def far_positions(probe: Probe, reading: Reading, limit: int) -> Tensor:
    """Positions around every corner of the lines across which the mask may change, int64, sorted.

    Every region between the lines has a corner; lines along rows, columns and diagonals meet at 45°, so a region
    has whole-number points within two steps of its corners.
    """
    lines = {(1, 0, 0.0), (0, 1, 0.0), (1, -1, 0.0), (1, 0, 1.0 - limit), (0, 1, 1.0 - limit)}
    scores = probe.candidate.scores
    shape = (
        tensor_of(scores).shape if scores is not None else tensor_of(probe.candidate.q).shape[:-1] + (probe.columns,)
    )
    for slopes, offset in reading.lines:
        for row, column, constant in _instances(dict(slopes), offset, shape):
            if max(abs(row), abs(column)) > 1:
                raise Unstable("unprovable", f"the mask compares multiples of positions ({row}·query + {column}·key)")
            if row or column:
                lines.add((row, column, constant))
    if len(lines) > 48:
        raise Unstable("unprovable", f"the mask changes along {len(lines) - 5} lines, too many to look at")
    wanted: set[int] = set(range(6))
    chosen = sorted(lines)
    for index, (a, b, c) in enumerate(chosen):
        for d, e, f in chosen[:index]:
            determinant = a * e - b * d
            if determinant:
                for corner in ((b * f - c * e) / determinant, (c * d - a * f) / determinant):
                    if math.isfinite(corner):
                        wanted |= {math.floor(corner) + step for step in (-2, -1, 0, 1, 2, 3)}
    return torch.tensor(sorted(p for p in wanted if 0 <= p < limit))


def _instances(slopes: dict[int, int], offset: float, shape: Any) -> list[tuple[int, int, float]]:
    """A line over all axes as lines over (row, column), one for each index of the axes of fixed size."""
    found = [offset]
    for axis, slope in slopes.items():
        size = expression(shape[axis]) if -axis <= len(shape) else None
        if size is not None and size.is_Integer:
            found = [value + slope * index for value in found for index in range(int(size))]
        elif axis not in (-1, -2):
            raise Unstable("per-batch", "the mask differs between the rows of a batch")
        if len(found) > 4096:
            raise Unstable("unprovable", "the mask compares positions with too many constants")
    fixed = [axis for axis in (-1, -2) if expression(shape[axis]).is_Integer]
    row, column = (0 if axis in fixed else slopes.get(axis, 0) for axis in (-2, -1))
    return [(row, column, value) for value in set(found)]


def near(probe: Probe, sizes: Sizes, masks: dict[str, Tensor] | None = None) -> View:
    """The view of a whole short sequence."""
    rows, columns = (torch.arange(sizes.concrete(extent)) for extent in (probe.rows, probe.columns))
    return View(sizes, rows, columns, masks=masks or {})


def far(probe: Probe, reading: Reading, positions: Tensor, masks: dict[str, Tensor] | None = None) -> View:
    """A view that makes the graph count ``positions`` instead of 0, 1, 2 … along its sequence axes."""
    sizes = probe.sizes(len(positions), other=0)
    for extent in (probe.rows, probe.columns):
        if symbols_in(extent) and sizes.concrete(extent) != len(positions):
            raise Unstable(
                "unprovable", f"queries or keys number {expression(extent)}, so the mask can't be looked at far away"
            )

    def coordinate(node: Node, axis: int) -> Tensor:
        extent = tensor_of(node).shape[axis]
        if any(symbols_in(extent) and same_dim(extent, other) for other in (probe.rows, probe.columns)):
            return positions
        if symbols_in(extent) & (symbols_in(probe.rows) | symbols_in(probe.columns)):
            raise Unstable(
                "unprovable", f"'{node.name}' counts to {expression(extent)}, so the mask can't be looked at far away"
            )
        return torch.arange(sizes.concrete(extent))

    module, leaf = probe.program.graph_module, probe.leaf(sizes, masks)
    env: dict[Node, Any] = {node: _place(node, form, sizes, coordinate) for node, form in reading.sources.items()}
    for node in reading.lookups:  # indexed by the plain positions, so the mask's own columns stand for any
        env[node] = evaluate(module, node, sizes, {}, leaf)
    for node in reading.triangles:  # in graph order
        source, edge = node.args[0], argument(node, 1, "diagonal", 0)
        assert isinstance(source, Node)
        values = evaluate(module, source, sizes, env, leaf)
        distance = (
            coordinate(node, -1)[None, :]
            - coordinate(node, -2)[:, None]
            - sizes.concrete(value_of(edge) if isinstance(edge, Node) else edge)
        )
        kept = distance <= 0 if target_of(node) is aten.tril.default else distance >= 0
        env[node] = torch.where(kept, values, torch.zeros((), dtype=values.dtype))
    rows, columns = (
        positions if symbols_in(extent) else torch.arange(int(extent)) for extent in (probe.rows, probe.columns)
    )
    return View(sizes, rows, columns, env, masks or {})


def _place(node: Node, form: Form, sizes: Sizes, coordinate: Any) -> Tensor:
    assert form.offsets is not None
    if len(form.offsets) != 1:
        raise Unstable("unprovable", f"'{node.name}' holds positions with several offsets")
    fake = tensor_of(node)
    value = torch.full([1] * fake.dim(), form.offsets[0], dtype=torch.float64)
    for axis, slope in form.slopes:
        along = coordinate(node, axis).to(torch.float64)
        value = value + slope * along.reshape([-1, *([1] * (-1 - axis))])
    return value.expand(sizes.shape(fake)).to(fake.dtype)
