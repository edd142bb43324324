"""Float ↔ integer codes with one symmetric scale per group: round-to-nearest as in FlexQ (arXiv 2508.04405, §3).

Weights: ``scale = absmax/31`` (six bits) or ``absmax/127`` (eight) per row and group of input features, rounded to
float16 *before* the codes are, so that what is stored is what was rounded against. Activations: the same, dynamic, per
token and group, with a float32 scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pack import CODE_MAX, GROUP_SIZE, check_group_size

# Largest magnitude of a code, by number of bits. Symmetric: −32 and −128 are left to clipping methods.
LEVELS = {6: CODE_MAX, 8: 127}
ACTIVATIONS = ("a6", "a8", "a16")
# Round-to-nearest with an exact scale never does worse than 14.8 dB on a row (one full-scale value and 127 values that
# are each half a step off), so a row below this can only come from a scale under float16's range.
_WORST_ROW_DB = 14.0


def split_groups(x: Tensor, group_size: int) -> Tensor:
    """``[…, K]`` → ``[…, ceil(K/group_size), group_size]``, a partial last group padded with zeros."""
    padding = -x.shape[-1] % group_size
    if padding:
        x = torch.nn.functional.pad(x, (0, padding))
    return torch.unflatten(x, -1, (x.shape[-1] // group_size, group_size))


def round_scale(scale: Tensor) -> Tensor:
    """Round positive float32 scales to float16 so that no value is clipped by it.

    To nearest, but up where nearest falls short by more than half a step of a full-scale code (only subnormal scales,
    which keep few bits, and scales that would vanish). Zero stays zero.

    Raises:
        ValueError: a scale exceeds float16's range (65504) or isn't finite.
    """
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("a scale isn't finite: the weights hold NaN or infinity")
    rounded = scale.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"a scale of {float(scale.max()):.4g} exceeds float16's range (65504)")
    short = rounded.float() * (1 + 0.5 / 127) < scale
    next_up = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(short, next_up, rounded)


def quantize_weight(
    weight: Tensor, group_size: int = GROUP_SIZE, bits: int = 6, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to symmetric codes, one float16 scale per row and group.

    Args:
        weight: float ``[N, K]``.
        group_size: input features per scale; the last group of a row may be partial.
        bits: 6 (codes in [−32, 31]) or 8 (codes in [−128, 127]).
        scale: float16 ``[N, ceil(K/group_size)]`` to round against, for methods that choose their own; by default
            absmax over the largest code. All-zero groups get scale 0 and codes 0.

    Returns:
        int8 codes ``[N, K]`` and float16 scales ``[N, ceil(K/group_size)]``.

    Raises:
        ValueError: not a float matrix, NaN or infinity, or a row whose magnitude float16 scales can't represent.
    """
    check_group_size(group_size)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"int6 weights must be a float matrix [N, K], got {weight.dtype} {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        row = int((~torch.isfinite(weight).all(dim=1)).nonzero()[0])
        raise ValueError(f"the weights hold NaN or infinity (first in row {row})")
    groups = split_groups(weight.float(), group_size)
    chosen = scale is not None
    if scale is None:
        scale = round_scale(groups.abs().amax(dim=-1) / LEVELS[bits])
    elif scale.shape != groups.shape[:-1] or scale.dtype != torch.float16:
        raise ValueError(f"scales must be float16 {list(groups.shape[:-1])}, got {scale.dtype} {list(scale.shape)}")
    codes = round_codes(groups, scale.float().unsqueeze(-1), bits)
    if not chosen:
        _check_rows(groups, codes, scale)
    return codes.to(torch.int8).flatten(1)[:, : weight.shape[1]].contiguous(), scale


def round_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``clamp(round(values / scale))`` in float, 0 where the scale is 0; round half to even. NaN stays NaN."""
    levels = LEVELS[bits]
    safe = torch.where(scale == 0, 1.0, scale)
    return torch.where(scale == 0, 0.0, torch.round(values / safe)).clamp_(-levels - 1, levels)


def dequantize(
    codes: Tensor, scale: Tensor, group_size: int = GROUP_SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``codes · scale`` as ``[N, K]`` of ``dtype``: exact in float32 (8 + 11 significant bits fit in 24) and above."""
    in_features = codes.shape[1]
    full = in_features // group_size * group_size
    out = codes.to(dtype)
    wide = scale.to(dtype).unsqueeze(-1)
    if full:
        torch.unflatten(out[:, :full], 1, (-1, group_size)).mul_(wide[:, : full // group_size])
    if full < in_features:
        out[:, full:].mul_(wide[:, -1])
    return out


def quantize_activation(x: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric codes per token and group.

    Args:
        x: float32 or float64 ``[…, K]``.
        bits: 6 (scale absmax/31) or 8 (scale absmax/127).

    Returns:
        codes as floats ``[…, G, group_size]`` (zero-padded) and scales ``[…, G]`` of x's dtype. A group that holds NaN
        or infinity gets a NaN or infinite scale, so the product is never a plausible wrong number.
    """
    groups = split_groups(x, group_size)
    scale = groups.abs().amax(dim=-1) / LEVELS[bits]
    return round_codes(groups, scale.unsqueeze(-1), bits), scale


def fake_quantize_activation(x: Tensor, group_size: int, activation: str) -> Tensor:
    """What ``x`` becomes after its codes are multiplied back by their scales; ``x`` itself for ``"a16"``."""
    if activation == "a16":
        return x
    codes, scale = quantize_activation(x, group_size, int(activation[1:]))
    return (codes * scale.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization-noise ratio in dB; ``inf`` for an exact copy (an all-zero one included)."""
    reference, approximation = reference.detach().double(), approximation.detach().double()
    noise, signal = float((reference - approximation).square().sum()), float(reference.square().sum())
    if noise == 0.0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def _check_rows(groups: Tensor, codes: Tensor, scale: Tensor) -> None:
    # Relative to the row's largest weight and in float64: squares of tiny weights would vanish and hide the loss.
    largest = groups.double().abs().amax(dim=(1, 2), keepdim=True).clamp_(min=torch.finfo(torch.float64).tiny)
    noise = ((codes * scale.float().unsqueeze(-1) - groups) / largest).square().sum(dim=(1, 2))
    bad = noise > (groups / largest).square().sum(dim=(1, 2)) * 10 ** (-_WORST_ROW_DB / 10)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row} is too small for float16 scales (largest weight {float(groups[row].abs().max()):.3g}):"
            " rescale the weights"
        )
