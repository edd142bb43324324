"""Ways to choose six- and eight-bit weight codes: round-to-nearest, clipping search, error feedback (GPTQ).

``rtn`` needs no data. ``clip`` shrinks each group's scale where that lowers the error weighted by the inputs' second
moments, ``Σ_k E[x_k²]·(w_k − ŵ_k)²``. ``gptq`` (Frantar et al., arXiv 2210.17323) rounds one input feature at a time
and moves the error it makes onto the features not yet rounded, by the inverse of ``E[xxᵀ]``; scales are those of the
weights as they stand when a group begins. Scales stay float16, groups and codes as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.int6_linear.codes import LEVELS, quantize_weight, round_codes, round_scale, split_groups
from .errors import LincompileError
from .linear_layers import LinearLayer
from .program import Program
from .schemes import Scheme
from .sensitivity import Batch, Compute, frozen, groups_of, run

METHODS = ("rtn", "clip", "gptq")
_RATIOS = [1.0 - 0.04 * step for step in range(11)]
_DAMPING = 0.01
_HESSIAN_BYTES = 512 << 20


class WeightRounder:
    """Codes and scales of a layer by a method.

    With calibration batches the codes are asked for again and again (scores, measured divergence, packing): they are
    computed once per layer and number of bits and kept, one byte per weight.

    Inputs are collected on the float graph for a few layers at a time, so that their ``E[xxᵀ]`` never take more than
    half a gigabyte.

    Raises:
        LincompileError: unknown method, or a method that needs calibration batches and has none.
    """

    def __init__(
        self,
        program: Program,
        layers: Sequence[LinearLayer],
        method: str,
        calibration: Sequence[Batch] | None,
        group_size: int,
    ) -> None:
        if method not in METHODS:
            raise LincompileError(f"unknown quantization method '{method}'; the choices are {', '.join(METHODS)}")
        if method != "rtn" and not calibration:
            raise LincompileError(
                f"the quantization method '{method}' needs calibration batches: give calibration text, or use rtn"
            )
        self._program, self._method, self._group_size = program, method, group_size
        self._calibration = list(calibration or [])
        self._chunks = _chunks(groups_of(layers))
        self._cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: LinearLayer, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """int8 codes ``[N, K]`` and float16 scales ``[N, groups]``."""
        bits = scheme.weight_bits
        if (layer.name, bits) in self._cache:
            return self._cache[layer.name, bits]
        if self._method == "rtn":
            found = quantize_weight(layer.matrix(self._program.graph_module), self._group_size, bits=bits)
            if self._calibration:
                self._cache[layer.name, bits] = found
            return found
        chunk = next(chunk for chunk in self._chunks if any(layer in group for group in chunk))
        for group, moment in zip(chunk, self._collect(chunk), strict=True):
            prepared = moment.diagonal() if self._method == "clip" else inverse_factor(moment)
            for member in group:
                self._cache[member.name, bits] = self._round(member, prepared, bits)
        return self._cache[layer.name, bits]

    def _round(self, layer: LinearLayer, prepared: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        weight = layer.matrix(self._program.graph_module).float()
        quantize_weight(weight, self._group_size, bits=bits)  # refuses what float16 scales can't hold
        return (clip if self._method == "clip" else gptq)(weight, prepared, self._group_size, bits)

    def _collect(self, chunk: Sequence[Sequence[LinearLayer]]) -> list[Tensor]:
        """``E[xxᵀ]`` of each group's input over the calibration batches, float32 ``[K, K]``."""
        leaders = {group[0].name: index for index, group in enumerate(chunk)}
        sums: list[Tensor | None] = [None] * len(chunk)
        counts = [0] * len(chunk)

        def on_linear(layer: LinearLayer, x: Tensor, bias: Tensor | None, compute: Compute) -> Tensor:
            if layer.name in leaders:
                index, flat = leaders[layer.name], x.flatten(0, -2).float()
                product = flat.t() @ flat
                previous = sums[index]
                sums[index] = product if previous is None else previous + product
                counts[index] += flat.shape[0]
            return compute()

        layers = [layer for group in chunk for layer in group]
        with frozen(self._program), torch.no_grad():
            for batch in self._calibration:
                run(self._program, batch, layers, on_linear)
        device = layers[0].matrix(self._program.graph_module).device
        return [  # inputs that no batch reached leave nothing to weigh by
            total / max(count, 1) if total is not None else torch.eye(group[0].in_features, device=device)
            for total, count, group in zip(sums, counts, chunk, strict=True)
        ]


def clip(weight: Tensor, second_moment: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scales searched per row and group: ``absmax/levels`` times 1.0, 0.96 … 0.6, by weighted squared error.

    Args:
        weight: float32 ``[N, K]``.
        second_moment: ``E[x_k²]``, ``[K]``.
    """
    groups = split_groups(weight, group_size)
    importance = split_groups(second_moment.float().unsqueeze(0), group_size)
    widest = groups.abs().amax(dim=-1) / LEVELS[bits]
    best_scale = round_scale(widest)
    best = torch.full_like(widest, float("inf"))
    for ratio in _RATIOS:
        scale = round_scale(widest * ratio)
        step = scale.float().unsqueeze(-1)
        error = ((round_codes(groups, step, bits) * step - groups).square() * importance).sum(dim=-1)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return quantize_weight(weight, group_size, bits=bits, scale=best_scale)


def gptq(weight: Tensor, factor: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Error feedback over input features in their order.

    Args:
        weight: float32 ``[N, K]``.
        factor: :func:`inverse_factor` of ``E[xxᵀ]``, ``[K, K]``.
    """
    work = weight.clone()
    rows, in_features = work.shape
    codes = torch.empty(rows, in_features, dtype=torch.int8, device=weight.device)
    scales = []
    for start in range(0, in_features, group_size):
        stop = min(start + group_size, in_features)
        scale = round_scale(work[:, start:stop].abs().amax(dim=1) / LEVELS[bits])
        step = scale.float()
        scales.append(scale)
        errors = torch.empty(rows, stop - start, device=weight.device)
        for k in range(start, stop):
            rounded = round_codes(work[:, k], step, bits)
            codes[:, k] = rounded.to(torch.int8)
            error = (work[:, k] - rounded * step) / factor[k, k]
            work[:, k:stop] -= error.unsqueeze(1) * factor[k, k:stop]
            errors[:, k - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, torch.stack(scales, dim=1)


def inverse_factor(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of ``E[xxᵀ]`` damped by 1 % of its mean diagonal; float32 ``[K, K]``.

    Features that were always 0 end up uncorrelated with the rest: GPTQ then rounds them to nearest.
    """
    matrix = moment.double()
    mean = float(matrix.diagonal().mean())
    damping = _DAMPING * mean if mean > 0 else 1.0
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * eye))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def _chunks(groups: Sequence[Sequence[LinearLayer]]) -> list[list[Sequence[LinearLayer]]]:
    chunks: list[list[Sequence[LinearLayer]]] = []
    used = _HESSIAN_BYTES + 1
    for group in groups:
        size = 4 * group[0].in_features ** 2
        if used + size > _HESSIAN_BYTES:
            chunks.append([])
            used = 0
        chunks[-1].append(group)
        used += size
    return chunks
