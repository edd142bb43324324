"""Ways to choose six- and eight-bit weight codes: round-to-nearest, clipping search, error feedback (GPTQ).

``rtn`` needs no data. The others weigh errors by second moments of the layer's inputs, ``E[‖g‖² xxᵀ]``: every token
counts by the squared gradient ``g`` of the log-likelihood at the layer's output, so that tokens whose activations are
huge and matter little (the first of a window, which attention parks on) don't decide how all others are rounded.

``clip`` chooses each group's scale by the error it leaves, weighted by the moments' diagonal. ``gptq`` (Frantar et al.,
arXiv 2210.17323) keeps those scales, rounds one input feature at a time, the heaviest first, and moves the error it
makes onto the features not yet rounded. Scales stay float16, groups and codes as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.int6_linear.codes import LEVELS, quantize_weight, round_codes, round_scale, split_groups
from .errors import LincompileError
from .linear_layers import LinearLayer
from .program import Program
from .schemes import Scheme
from .sensitivity import Batch, backward, frozen
from .smooth import smooth

METHODS = ("auto", "rtn", "clip", "gptq")
_RATIOS = [1.02 - 0.02 * step for step in range(24)]
_DAMPING = 0.3  # heavy-tailed weights make few tokens count: less damping fits those and loses on others
_MOMENT_BYTES = 1 << 30
_BLOCK = 64  # features rounded before their error reaches those outside the block


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
    """

    def __init__(
        self,
        program: Program,
        layers: Sequence[LinearLayer],
        method: str,
        calibration: Sequence[Batch] | None,
        group_size: int,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.method = resolve(method, calibration)
        self._program, self._group_size = program, group_size
        self._calibration = list(calibration or [])
        self._chunks = _chunks(layers)
        self._moments = {name: moment.clone() for name, moment in (moments or {}).items()}
        self._cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

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
        moment = self._moments[layer.name]
        if self.method == "clip":
            return clip(weight, moment.diagonal(), self._group_size, bits)
        return gptq(weight, moment, self._group_size, bits)

    def moments(self) -> Mapping[str, Tensor]:
        """Second moments of the inputs of the first chunk's layers, ``[K, K]`` each."""
        if not self._moments and self._chunks:
            self._moments = self._collect(self._chunks[0])
        return self._moments

    def smooth(self, layers: Sequence[LinearLayer], strength: float) -> dict[str, Tensor]:
        """Balance the program's inputs and weights (:mod:`.smooth`); ``layers`` are all of its linear layers.

        Must come before any codes are asked for. Needs calibration batches.
        """
        assert self._calibration and not self._cache
        if len(self._chunks) == 1:
            importance = {name: moment.diagonal() for name, moment in self.moments().items()}
        else:
            sums = self._sums([layer for chunk in self._chunks for layer in chunk], full=False)
            importance = {name: total / total.mean().clamp(min=1e-30) for name, total in sums.items()}
        done = smooth(self._program, layers, importance, strength)
        for name, scale in done.items():
            if name in self._moments:
                self._moments[name] /= scale * scale.unsqueeze(1)
        return done

    def _collect(self, layers: Sequence[LinearLayer]) -> dict[str, Tensor]:
        """Second moments of the layers' inputs, float32 ``[K, K]`` with a mean diagonal of 1.

        The identity where no gradient arrived: there is nothing to weigh by.
        """
        moments = self._sums(layers, full=True)
        for layer in layers:
            mean = float(moments[layer.name].diagonal().mean()) if layer.name in moments else 0.0
            device = layer.matrix(self._program.graph_module).device
            moments[layer.name] = moments[layer.name] / mean if mean > 0 else torch.eye(layer.in_features).to(device)
        return moments

    def _sums(self, layers: Sequence[LinearLayer], *, full: bool) -> dict[str, Tensor]:
        """``Σ ‖g‖² xxᵀ`` over the calibration batches, or only its diagonal."""
        sums: dict[str, Tensor] = {}

        def visit(layer: LinearLayer, x: Tensor, grad: Tensor) -> None:
            flat = x.flatten(0, -2).float()
            weighted = flat * grad.flatten(0, -2).float().square().sum(dim=1, keepdim=True)
            found = weighted.t() @ flat if full else (weighted * flat).sum(dim=0)
            sums[layer.name] = sums[layer.name].add_(found) if layer.name in sums else found

        with frozen(self._program):
            for seed, batch in enumerate(self._calibration):
                backward(self._program, layers, batch, seed, visit)
        return sums


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


def gptq(weight: Tensor, moment: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Error feedback over input features by falling moment, at the scales of :func:`clip_scale`.

    Args:
        weight: float32 ``[N, K]``.
        moment: second moments of the inputs, ``[K, K]``.
    """
    rows, in_features = weight.shape
    scale = clip_scale(weight, moment.diagonal(), group_size, bits)
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moment[order][:, order])
    work = weight[:, order]
    steps = scale.float()[:, order // group_size]
    rounded = torch.empty_like(work)
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        errors = torch.empty(rows, stop - start, device=weight.device)
        for k in range(start, stop):
            rounded[:, k] = round_codes(work[:, k], steps[:, k], bits)
            error = (work[:, k] - rounded[:, k] * steps[:, k]) / factor[k, k]
            work[:, k:stop] -= error.unsqueeze(1) * factor[k, k:stop]
            errors[:, k - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    codes = torch.empty(rows, in_features, dtype=torch.int8, device=weight.device)
    codes[:, order] = rounded.to(torch.int8)
    return codes, scale


def inverse_factor(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of ``moment`` damped by 30 % of its mean diagonal; float32 ``[K, K]``.

    Features that were always 0 end up uncorrelated with the rest: GPTQ then rounds them to nearest.
    """
    matrix = moment.double()
    mean = float(matrix.diagonal().mean())
    damping = _DAMPING * mean if mean > 0 else 1.0
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * eye))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def _chunks(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    chunks: list[list[LinearLayer]] = []
    used = _MOMENT_BYTES + 1
    for layer in layers:
        size = 4 * layer.in_features**2
        if used + size > _MOMENT_BYTES:
            chunks.append([])
            used = 0
        chunks[-1].append(layer)
        used += size
    return chunks
