"""The decay gate of GLA (arXiv 2312.06635): per key feature,
``log α = max(logsigmoid(z Wᵀ + b) / temperature, lowest)`` (None: no floor).

z ``[B, T, R]`` is the hidden states' low-rank projection, weight ``[Hkv · F, R]``, bias ``[Hkv · F]``, mask ``[B, T]``
bool (True = real token; padded tokens don't decay). Written as ``−softplus(−x)``: ``log(sigmoid(x))`` is −inf at −20.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..shapes import accumulator_dtype


def forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> Tensor:
    """log_decay ``[B, Hkv, T, F]`` in z's dtype, from ``lowest`` to 0."""
    out = _unbounded(_logits(z, weight, bias, kv_heads), temperature)
    if lowest is not None:
        out = out.clamp(min=lowest)
    if mask is not None:
        out = out * mask[:, None, :, None]
    return out.to(z.dtype)


def backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for z, weight and bias, none from what the floor holds; the forward is recomputed."""
    logits = _logits(z, weight, bias, kv_heads)
    slopes = grad.to(logits.dtype) * torch.sigmoid(-logits) / temperature
    if lowest is not None:
        slopes = slopes.masked_fill(_unbounded(logits, temperature) < lowest, 0.0)
    if mask is not None:
        slopes = slopes * mask[:, None, :, None]
    flat = slopes.transpose(1, 2).flatten(2)
    d_weight = torch.einsum("btf,btr->fr", flat, z.to(flat.dtype))
    return (flat @ weight.to(flat.dtype)).to(z.dtype), d_weight.to(weight.dtype), flat.sum((0, 1)).to(bias.dtype)


def _unbounded(logits: Tensor, temperature: float) -> Tensor:
    return -functional.softplus(-logits) / temperature


def _logits(z: Tensor, weight: Tensor, bias: Tensor, kv_heads: int) -> Tensor:
    wide = accumulator_dtype(z, weight, bias)
    logits = functional.linear(z.to(wide), weight.to(wide), bias.to(wide))
    return torch.unflatten(logits, -1, (kv_heads, -1)).transpose(1, 2)
