"""Hedgehog features (arXiv 2402.04347) of convolved queries or keys, as LAWCAT (arXiv 2509.18467) chains them.

``φ(x) = [softmax(c W + b) ⊕ softmax(−(c W + b))]`` with ``c`` the causal depthwise convolution of x, padded tokens
counting as zeros (``c = x`` where there is no convolution). x ``[B, H, T, D]``, conv_weight ``[H · D, taps]``,
initial_state ``[B, H · D, taps - 1]``, weight ``[M, D, D]`` and bias ``[M, 1, D]`` with one map for each ``H // M``
heads, mask ``[B, T]`` bool (True = real token). ``mask_output`` also zeroes the features of padded tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import accumulator_dtype, group_heads
from ..short_conv import reference as short_conv

Grads = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]


def forward(
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, Tensor]:
    """Features ``[B, H, T, 2 · D]`` and the convolution's final state ``[B, H · D, taps - 1]``, in x's dtype."""
    mixed, state = _convolve(x, conv_weight, initial_state, mask)
    positive, negative = _halves(mixed, weight, bias)
    features = torch.cat((positive, negative), -1).flatten(1, 2)
    if mask is not None and mask_output:
        features = features * mask[:, None, :, None]
    return features.to(x.dtype), state


def backward(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> Grads:
    """Gradients for x, conv_weight, initial_state, weight and bias (None where absent); the forward is recomputed."""
    mixed, _ = _convolve(x, conv_weight, initial_state, mask)
    positive, negative = _halves(mixed, weight, bias)
    if mask is not None and mask_output:
        grad = grad * mask[:, None, :, None]
    d_positive, d_negative = group_heads(grad.to(positive.dtype), weight.shape[0]).chunk(2, -1)
    d_y = _softmax_gradient(positive, d_positive) - _softmax_gradient(negative, d_negative)
    keys = group_heads(mixed.to(positive.dtype), weight.shape[0])
    d_weight = torch.einsum("bmgti,bmgtj->mij", keys, d_y).to(weight.dtype)
    d_bias = d_y.sum((0, 2, 3))[:, None].to(bias.dtype)
    d_mixed = (d_y @ weight.to(d_y.dtype)[:, None].transpose(-1, -2)).flatten(1, 2).to(x.dtype)
    if conv_weight is None:
        return d_mixed, None, None, d_weight, d_bias
    flat = _flat(x, mask)
    slopes = d_mixed.transpose(1, 2).flatten(2)
    d_flat, d_conv, d_initial = short_conv.backward(slopes, grad_state, flat, conv_weight, initial_state)
    if mask is not None:
        d_flat = d_flat * mask[:, :, None]
    return _heads(d_flat, x), d_conv, d_initial, d_weight, d_bias


def _flat(x: Tensor, mask: Tensor | None) -> Tensor:
    flat = x.transpose(1, 2).flatten(2)
    return flat if mask is None else flat * mask[:, :, None]


def _heads(flat: Tensor, x: Tensor) -> Tensor:
    return torch.unflatten(flat, -1, (x.shape[1], x.shape[3])).transpose(1, 2)


def _convolve(
    x: Tensor, conv_weight: Tensor | None, initial_state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if conv_weight is None:
        return x, x.new_empty(x.shape[0], x.shape[1] * x.shape[3], 0)
    mixed, state = short_conv.forward(_flat(x, mask), conv_weight, initial_state)
    return _heads(mixed, x), state


def _halves(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    wide = accumulator_dtype(x, weight, bias)
    y = group_heads(x.to(wide), weight.shape[0]) @ weight.to(wide)[:, None] + bias.to(wide)[:, None]
    return torch.softmax(y, -1), torch.softmax(-y, -1)


def _softmax_gradient(p: Tensor, d_p: Tensor) -> Tensor:
    return p * (d_p - (p * d_p).sum(-1, keepdim=True))
