"""Ways to choose six- and eight-bit weight codes: round-to-nearest, clipping search, error feedback (GPTQ).

``rtn`` needs no data. The others weigh errors by second moments of the layer's inputs, ``E[‖g‖² xxᵀ]``: every token
counts by the squared gradient ``g`` of the log-likelihood at the layer's output, so that tokens whose activations are
huge and matter little (the first of a window, which attention parks on) don't decide how all others are rounded.

``clip`` chooses each group's scale by the error it leaves, weighted by the moments' diagonal. ``gptq`` (Frantar et al.,
arXiv 2210.17323) keeps those scales, rounds one input feature at a time, the heaviest first, and moves the error it
makes onto the features not yet rounded. In layers with no more outputs than inputs it does the same over the outputs
(as arXiv 2505.22988 proposes): with second moments ``E[ggᵀ]`` of the gradients, what a block of rows got wrong is moved
onto the rows not yet rounded. Before that, a layer makes up for the rounding of those that make its inputs
(:mod:`.compensate`). Scales stay float16, groups and codes as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.int6_linear.codes import LEVELS, dequantize, quantize_weight, round_codes, round_scale, split_groups
from ..errors import LincompileError
from ..program import Program
from .compensate import corrected, find_parts, replay
from .linear_layers import LinearLayer
from .schemes import Scheme
from .sensitivity import Batch, backward, frozen
from .smooth import smooth

METHODS = ("auto", "rtn", "clip", "gptq")
_RATIOS = [1.02 - 0.02 * step for step in range(24)]
_DAMPING = 0.3  # heavy-tailed weights make few tokens count: less damping fits those and loses on others
_MOMENT_BYTES = 1 << 30
_WEIGHTS_TOGETHER = 1 << 24  # in layers rounded together: a gigabyte's worth of copies at most
_BLOCK = 64  # features rounded before their error reaches those outside the block
_ROW_BLOCKS = 8  # of a layer's outputs: errors move from block to block
_MOST_OUTPUTS = 8192  # beyond, moments of the outputs take more memory and time than they are worth


class Moments(NamedTuple):
    """Second moments of a layer: of its inputs ``[K, K]``, of the gradients at its outputs ``[N, N]`` or None.

    ``tokens``: what each token counted, ``[tokens]`` for every batch that reached the layer's output, by its index.
    """

    inputs: Tensor
    outputs: Tensor | None = None
    tokens: Mapping[int, Tensor] = MappingProxyType({})


def resolve(method: str, calibration: Sequence[Batch] | None) -> str:
    """The method that ``auto`` stands for: ``gptq`` with calibration batches, ``rtn`` without.

    Raises:
        LincompileError: unknown method, or a method that needs calibration batches and has none.
    """
    if method not in METHODS:
        raise LincompileError(f"unknown quantization method '{method}'; the choices are {', '.join(METHODS)}")
    if method == "auto":
        return "gptq" if calibration else "rtn"
    if method != "rtn" and not calibration:
        raise LincompileError(
            f"the quantization method '{method}' needs calibration batches: give calibration text, or use rtn"
        )
    return method


class WeightRounder:
    """Codes and scales of a layer by a method (one that :func:`resolve` gives).

    With calibration batches the codes are asked for again and again (scores, measured divergence, packing): they are
    computed once per layer and number of bits and kept, one byte per weight.

    Moments are collected on the float graph for as many layers at a time as fit in a gigabyte (at least one), with one
    forward and one backward pass per batch; they are kept until another chunk of layers is asked for. ``moments`` are
    those of an earlier call of :meth:`moments` on the same float program, to save that pass.

    With ``compensate``, ``gptq`` lets layers make up for the rounding of those that make their inputs. Only where all
    layers will be stored with the same number of bits: otherwise it would make up for errors that nobody makes.
    """

    def __init__(
        self,
        program: Program,
        layers: Sequence[LinearLayer],
        method: str,
        calibration: Sequence[Batch] | None,
        group_size: int,
        moments: Mapping[str, Moments] | None = None,
        compensate: bool = False,
    ) -> None:
        self.method = resolve(method, calibration)
        self._program, self._group_size = program, group_size
        self._calibration = list(calibration or [])
        self._chunks = _chunks(layers)
        self._moments = dict(moments or {})
        self._cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._parts = find_parts(layers) if compensate and self.method == "gptq" else {}
        self._crosses: dict[tuple[str, int], Tensor] = {}

    def __call__(self, layer: LinearLayer, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """int8 codes ``[N, K]`` and float16 scales ``[N, groups]``."""
        bits = scheme.weight_bits
        if (layer.name, bits) not in self._cache:
            found = self._round(layer, bits)
            if not self._calibration:
                return found
            self._cache[layer.name, bits] = found
        return self._cache[layer.name, bits]

    def _round(self, layer: LinearLayer, bits: int) -> tuple[Tensor, Tensor]:
        weight = layer.matrix(self._program.graph_module).float()
        plain = quantize_weight(weight, self._group_size, bits=bits)  # refuses what float16 scales can't hold
        if self.method == "rtn":
            return plain
        if layer.name not in self._moments:
            self._moments = {}
            self._moments = self._collect(next(chunk for chunk in self._chunks if layer in chunk))
        if self.method == "clip":
            return clip(weight, self._moments[layer.name].inputs.diagonal(), self._group_size, bits)
        if layer.name in self._parts and (layer.name, bits) not in self._crosses:
            self._crosses = self._collect_crosses(next(chunk for chunk in self._chunks if layer in chunk), bits)
        alike = self._alike(layer, bits)
        moments = [self._moments[other.name] for other in alike]
        weights = [self._target(other, bits) for other in alike]
        for other, found in zip(alike, gptq_alike(weights, moments, self._group_size, bits), strict=True):
            self._cache[other.name, bits] = found
        return self._cache[layer.name, bits]

    def _target(self, layer: LinearLayer, bits: int) -> Tensor:
        """The weights to round: with what they make up for."""
        weight = layer.matrix(self._program.graph_module).float()
        if layer.name not in self._parts:
            return weight
        return corrected(weight, self._moments[layer.name].inputs, self._crosses[layer.name, bits])

    def _alike(self, layer: LinearLayer, bits: int) -> list[LinearLayer]:
        """``layer``, and others that can be rounded with it now: of its shape, with moments at hand, not yet rounded.

        Not those that float16 scales can't hold, which are refused on their own.
        """

        def kind(one: LinearLayer) -> tuple[object, ...]:
            known = self._moments[one.name].outputs is None, one.name in self._parts
            return one.out_features, one.in_features, *known

        found = [layer]
        for other in next(chunk for chunk in self._chunks if layer in chunk):
            full = (len(found) + 1) * layer.weights > _WEIGHTS_TOGETHER
            if full or other is layer or (other.name, bits) in self._cache or other.name not in self._moments:
                continue
            if kind(other) == kind(layer) and self._fits(other, bits):
                found.append(other)
        return found

    def _fits(self, layer: LinearLayer, bits: int) -> bool:
        try:
            quantize_weight(layer.matrix(self._program.graph_module).float(), self._group_size, bits=bits)
        except ValueError:
            return False
        return True

    def _collect_crosses(self, layers: Sequence[LinearLayer], bits: int) -> dict[tuple[str, int], Tensor]:
        """What those of ``layers`` that can should make up for: the ``cross`` of :func:`.compensate.corrected`.

        Makers come before what they make, so their codes are there, or made now from the same chunk's moments.
        """
        parts = [self._parts[layer.name] for layer in layers if layer.name in self._parts]
        module = self._program.graph_module
        rounded: dict[str, Tensor] = {}
        for maker in (maker for part in parts for maker in part.makers):
            if (maker.name, bits) not in self._cache:
                self._cache[maker.name, bits] = self._round(maker, bits)
            rounded[maker.name] = dequantize(*self._cache[maker.name, bits], self._group_size)
        if layers[0].name not in self._moments:  # a maker's chunk took their place
            self._moments = self._collect(layers)
        sums: dict[str, Tensor] = {}
        power = dict.fromkeys((part.layer.name for part in parts), 0.0)

        def visit(index: int, layer: LinearLayer, x: Tensor, other: Tensor) -> None:
            count = self._moments[layer.name].tokens.get(index)
            if count is None:  # no gradient arrived: its tokens count for nothing
                return
            exact, read = x.flatten(0, -2).float(), other.flatten(0, -2).float()
            weighted = read * count.unsqueeze(1)
            lost = F.linear(exact - read, layer.matrix(module).float())
            _add(sums, layer.name, lost.t() @ weighted)
            power[layer.name] += float((weighted * read).sum(dim=0).mean())

        with frozen(self._program), torch.no_grad():
            for index, batch in enumerate(self._calibration):
                replay(self._program, batch, parts, rounded, partial(visit, index))
        crosses = {}
        for part in parts:
            name, shape = part.layer.name, (part.layer.out_features, part.layer.in_features)
            device = part.layer.matrix(module).device
            found = sums[name] / power[name] if power[name] > 0 else torch.zeros(shape, device=device)
            crosses[name, bits] = found
        return crosses

    def moments(self) -> Mapping[str, Moments]:
        """Second moments of the first chunk's layers."""
        if not self._moments and self._chunks:
            self._moments = self._collect(self._chunks[0])
        return self._moments

    def smooth(self, layers: Sequence[LinearLayer], strength: float) -> dict[str, Tensor]:
        """Balance the program's inputs and weights (:mod:`.smooth`); ``layers`` are all of its linear layers.

        Must come before any codes are asked for. Needs calibration batches.
        """
        assert self._calibration and not self._cache
        if len(self._chunks) == 1:
            importance = {name: moment.inputs.diagonal() for name, moment in self.moments().items()}
        else:
            sums, _, _ = self._sums([layer for chunk in self._chunks for layer in chunk], full=False)
            importance = {name: total / total.mean().clamp(min=1e-30) for name, total in sums.items()}
        done = smooth(self._program, layers, importance, strength)
        for name, moment in self._moments.items():
            inputs, outputs, tokens = moment
            if name in done.inputs:
                inputs = inputs / outer(done.inputs[name])
            if name in done.outputs and outputs is not None:  # smaller outputs have larger gradients
                outputs = outputs * outer(done.outputs[name])
            self._moments[name] = Moments(inputs, outputs, tokens)
        return done.inputs

    def _collect(self, layers: Sequence[LinearLayer]) -> dict[str, Moments]:
        """Moments with a mean diagonal of 1; of the inputs the identity where no gradient arrived."""
        sums, gradients, tokens = self._sums(layers, full=True)
        moments: dict[str, Moments] = {}
        for layer in layers:
            device = layer.matrix(self._program.graph_module).device
            inputs = normalised(sums.get(layer.name))
            if inputs is None:
                inputs = torch.eye(layer.in_features, device=device)
            moments[layer.name] = Moments(inputs, normalised(gradients.get(layer.name)), tokens.get(layer.name, {}))
        return moments

    def _sums(
        self, layers: Sequence[LinearLayer], *, full: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[int, Tensor]]]:
        """``Σ ‖g‖² xxᵀ`` over the calibration batches, or only its diagonal; for GPTQ ``Σ ggᵀ``, and each ``‖g‖²``."""
        tokens: dict[str, dict[int, Tensor]] = {}
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def visit(layer: LinearLayer, x: Tensor, grad: Tensor) -> None:
            flat, gradient = x.flatten(0, -2).float(), grad.flatten(0, -2).float()
            count = gradient.square().sum(dim=1)
            if layer.name in self._parts:
                tokens.setdefault(layer.name, {})[seed] = count
            weighted = flat * count.unsqueeze(1)
            _add(inputs, layer.name, weighted.t() @ flat if full else (weighted * flat).sum(dim=0))
            if full and self.method == "gptq" and _over_outputs(layer):
                _add(outputs, layer.name, gradient.t() @ gradient)

        with frozen(self._program):
            for seed, batch in enumerate(self._calibration):
                backward(self._program, layers, batch, seed, visit)
        return inputs, outputs, tokens


def _over_outputs(layer: LinearLayer) -> bool:
    """Whether errors move between outputs, too: not where outputs outnumber inputs (gate, up: measured, no gain)."""
    return layer.out_features <= min(layer.in_features, _MOST_OUTPUTS)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value


def normalised(moment: Tensor | None) -> Tensor | None:
    """A moment matrix with a mean diagonal of 1; None where there is none or nothing in it."""
    mean = 0.0 if moment is None else float(moment.diagonal().mean())
    return moment / mean if moment is not None and mean > 0 else None


def outer(scale: Tensor) -> Tensor:
    """``scale scaleᵀ``."""
    return scale * scale.unsqueeze(1)


def clip(weight: Tensor, importance: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes at the scales of :func:`clip_scale`."""
    return quantize_weight(weight, group_size, bits=bits, scale=clip_scale(weight, importance, group_size, bits))


def clip_scale(weight: Tensor, importance: Tensor, group_size: int, bits: int) -> Tensor:
    """Scales searched per row and group: ``absmax/levels`` times 1.02, 1.00 … 0.56, by weighted squared error.

    Args:
        weight: float32 ``[N, K]``.
        importance: what an input feature's squared error counts, ``[K]``.

    Returns:
        float16 ``[N, ceil(K/group_size)]``.
    """
    groups = split_groups(weight, group_size)
    weigh = split_groups(importance.float().unsqueeze(0), group_size)
    widest = groups.abs().amax(dim=-1) / LEVELS[bits]
    best_scale = round_scale(widest)
    best = torch.full_like(widest, float("inf"))
    for ratio in [1.0, *_RATIOS]:
        scale = round_scale(widest * ratio)
        step = scale.float().unsqueeze(-1)
        error = ((round_codes(groups, step, bits) * step - groups).square() * weigh).sum(dim=-1)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale


def gptq(
    weight: Tensor, moment: Tensor, group_size: int, bits: int, outputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Error feedback over input features by falling moment, at the scales of :func:`clip_scale`.

    With ``outputs``, then over blocks of rows, too: the codes lower ``tr(outputs · E · moment · Eᵀ)`` of the error E.

    Args:
        weight: float32 ``[N, K]``.
        moment: second moments of the inputs, ``[K, K]``.
        outputs: second moments of the gradients at the outputs, ``[N, N]``.
    """
    return gptq_alike([weight], [Moments(moment, outputs)], group_size, bits)[0]


def gptq_alike(
    weights: Sequence[Tensor], moments: Sequence[Moments], group_size: int, bits: int
) -> list[tuple[Tensor, Tensor]]:
    """:func:`gptq` of several layers of one shape at once, all with moments of their outputs or none.

    Features follow each other whatever the device, in operations that hardly keep a GPU busy: thirty layers at once
    take no longer than one.
    """
    rows, in_features = weights[0].shape
    inputs = [moment.inputs for moment in moments]
    scales = [clip_scale(w, m.diagonal(), group_size, bits) for w, m in zip(weights, inputs, strict=True)]
    columns = [m.diagonal().argsort(descending=True, stable=True) for m in inputs]
    factor = torch.stack([inverse_factor(m[c][:, c]) for m, c in zip(inputs, columns, strict=True)])
    target = torch.stack([w[:, c] for w, c in zip(weights, columns, strict=True)])
    steps = torch.stack([s.float()[:, c // group_size] for s, c in zip(scales, columns, strict=True)])
    outputs = [moment.outputs for moment in moments if moment.outputs is not None]
    if not outputs:
        rounded = _feed_back(target, steps, factor, bits)
    else:
        sequences = torch.stack([o.diagonal().argsort(descending=True, stable=True) for o in outputs])
        upper = torch.stack([inverse_factor(o[q][:, q]) for o, q in zip(outputs, sequences, strict=True)])
        index = sequences.unsqueeze(2).expand(target.shape)
        target, steps = target.gather(1, index), steps.gather(1, index)
        rounded = torch.empty_like(target)
        size = -(-rows // _ROW_BLOCKS)
        for part in (slice(start, start + size) for start in range(0, rows, size)):
            rounded[:, part] = _feed_back(target[:, part], steps[:, part], factor, bits)
            error = target[:, part] - rounded[:, part] * steps[:, part]
            moved = torch.linalg.solve_triangular(upper[:, part, part].mT, error, upper=False)
            target[:, part.stop :] -= upper[:, part, part.stop :].mT @ moved
        rounded = torch.empty_like(rounded).scatter_(1, index, rounded)
    found = []
    for codes_by_moment, order, scale in zip(rounded, columns, scales, strict=True):
        codes = torch.empty(rows, in_features, dtype=torch.int8, device=target.device)
        codes[:, order] = codes_by_moment.to(torch.int8)
        found.append((codes, scale))
    return found


def _feed_back(target: Tensor, steps: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Codes of ``target [L, N, K]`` at ``steps``, column by column, each column's error moved onto those after it."""
    work, rounded = target.clone(), torch.empty_like(target)
    diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(1)
    for start in range(0, work.shape[2], _BLOCK):
        stop = min(start + _BLOCK, work.shape[2])
        errors = torch.empty(*work.shape[:2], stop - start, device=work.device)
        for k in range(start, stop):
            rounded[..., k] = round_codes(work[..., k], steps[..., k], bits)
            error = (work[..., k] - rounded[..., k] * steps[..., k]) / diagonal[..., k]
            work[..., k:stop] -= error.unsqueeze(2) * factor[:, None, k, k:stop]
            errors[..., k - start] = error
        work[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return rounded


def inverse_factor(moment: Tensor, share: float = _DAMPING) -> Tensor:
    """Upper Cholesky factor of the inverse of ``moment`` damped by a share of its mean diagonal; float32 ``[K, K]``.

    Features that were always 0 end up uncorrelated with the rest: GPTQ then rounds them to nearest.
    """
    matrix = moment.double()
    mean = float(matrix.diagonal().mean())
    damping = share * mean if mean > 0 else 1.0
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * eye))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def _chunks(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    chunks: list[list[LinearLayer]] = []
    used = _MOMENT_BYTES + 1
    for layer in layers:
        size = 4 * (layer.in_features**2 + (layer.out_features**2 if _over_outputs(layer) else 0))
        if used + size > _MOMENT_BYTES:
            chunks.append([])
            used = 0
        chunks[-1].append(layer)
        used += size
    return chunks
