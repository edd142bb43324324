"""``int6_linear`` on any device with plain tensor operations: the definition, and a form fast enough for a CPU.

``y[m, n] = Σ_g s_x[m, g] · s_w[n, g] · Σ_{k ∈ g} x̂[m, k] · c[n, k]  (+ bias[n])`` with integer codes ``x̂`` and ``c``;
for ``activation="a16"`` the activations stay floats.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .codes import dequantize, fake_quantize_activation, quantize_activation, split_groups
from .pack import GROUP_SIZE, unpack

# The CPU form unpacks this many weights at a time: a float32 block of 2 MB stays in cache, and is all it costs.
_BLOCK_WEIGHTS = 1 << 19


def int6_linear_definition(
    x: Tensor,
    weight_hi: Tensor,
    weight_lo: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int = GROUP_SIZE,
    activation: str = "a8",
) -> Tensor:
    """The definition: exact integer sums, then float64; slow, for tests. Shapes and errors as :func:`int6_linear`."""
    codes = unpack(weight_hi, weight_lo, x.shape[-1], group_size)
    return int8_linear_definition(x, codes, weight_scale, bias, group_size, activation)


def int8_linear_definition(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str
) -> Tensor:
    """The definition of ``int8_linear``: int8 codes ``weight [N, K]``; float64 ``[…, N]``, not rounded to x's."""
    weight_groups = split_groups(weight, group_size)
    if activation == "a16":
        codes, token_scale = split_groups(x.double(), group_size), None
    else:
        codes, token_scale = quantize_activation(_compute(x), group_size, int(activation[1:]))
    sums = torch.einsum("...gk,ngk->...ng", codes.double(), weight_groups.double())  # integers below 2^53: exact
    y = sums * weight_scale.double()
    if token_scale is not None:
        y = y * token_scale.double().unsqueeze(-2)
    y = y.sum(dim=-1)
    return y if bias is None else y + bias.double()


def int6_linear(
    x: Tensor,
    weight_hi: Tensor,
    weight_lo: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int = GROUP_SIZE,
    activation: str = "a8",
) -> Tensor:
    """Linear layer with packed six-bit weights.

    Args:
        x: float ``[…, K]``; computed in float32 (float64 for float64 inputs).
        weight_hi: uint8 ``[N, ceil(K/2)]``.
        weight_lo: uint8 ``[N, ceil(K/4)]``; :mod:`.pack` gives the order of codes.
        weight_scale: float16 ``[N, ceil(K/group_size)]``.
        bias: float ``[N]`` or None.
        group_size: input features per scale.
        activation: ``"a8"`` or ``"a6"`` (dynamic, per token and group) or ``"a16"`` (left alone).

    Returns:
        ``[…, N]`` in x's dtype.
    """
    y = x.new_empty(*x.shape[:-1], weight_hi.shape[0])
    operand = fake_quantize_activation(_compute(x), group_size, activation)
    for rows in _blocks(weight_hi.shape[0], x.shape[-1]):
        codes = unpack(weight_hi[rows], weight_lo[rows], x.shape[-1], group_size)
        _linear_block(y, operand, codes, weight_scale, bias, group_size, rows)
    return y


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str
) -> Tensor:
    """As :func:`int6_linear` with eight-bit codes, ``weight`` int8 ``[N, K]``."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    operand = fake_quantize_activation(_compute(x), group_size, activation)
    for rows in _blocks(weight.shape[0], x.shape[-1]):
        _linear_block(y, operand, weight[rows], weight_scale, bias, group_size, rows)
    return y


def int6_linear_input_grad(
    grad: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int
) -> Tensor:
    """Gradient for x, ``grad […, N] @ dequantized weight``: the rounding of activations passes it straight through."""
    out = torch.zeros(*grad.shape[:-1], in_features, dtype=_compute(grad).dtype, device=grad.device)
    for rows in _blocks(weight_hi.shape[0], in_features):
        codes = unpack(weight_hi[rows], weight_lo[rows], in_features, group_size)
        out += _compute(grad[..., rows]) @ dequantize(codes, weight_scale[rows], group_size, out.dtype)
    return out.to(grad.dtype)


def int8_linear_input_grad(grad: Tensor, weight: Tensor, weight_scale: Tensor, group_size: int) -> Tensor:
    """As :func:`int6_linear_input_grad` for ``int8_linear``."""
    out = torch.zeros(*grad.shape[:-1], weight.shape[1], dtype=_compute(grad).dtype, device=grad.device)
    for rows in _blocks(*weight.shape):
        out += _compute(grad[..., rows]) @ dequantize(weight[rows], weight_scale[rows], group_size, out.dtype)
    return out.to(grad.dtype)


def _linear_block(
    y: Tensor, operand: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group_size: int, rows: slice
) -> None:
    weight = dequantize(codes, scale[rows], group_size, operand.dtype)
    y[..., rows] = torch.nn.functional.linear(operand, weight, None if bias is None else bias[rows].to(operand.dtype))


def _blocks(rows: int, in_features: int) -> Iterator[slice]:
    step = max(1, _BLOCK_WEIGHTS // max(1, in_features))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
