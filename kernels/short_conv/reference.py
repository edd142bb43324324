"""Causal depthwise convolution with a carried state, in one form that serves training, prefill and decode.

``x [B, T, C]``, ``weight [C, W]`` (the last tap multiplies the current token), state ``[B, C, W - 1]`` holding the
last inputs, oldest first. The loop is over the W taps (4 in LAWCAT, arXiv 2509.18467), never over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, token by token. Returns ``y [B, T, C]`` and the final state."""
    state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat((state, x[:, t, :, None]), -1)
        outputs.append((window * weight).sum(-1))
        state = window[..., 1:]
    return (torch.stack(outputs, 1) if outputs else torch.empty_like(x)), state


def forward(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Same function, vectorised over tokens; sums in float32 (float64 for float64), results in x's dtype."""
    taps, length = weight.shape[1], x.shape[1]
    padded = _with_state(x, taps, initial_state)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    kernel = weight.to(wide)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for tap in range(taps):
        y.addcmul_(padded[:, tap : tap + length].to(wide), kernel[:, tap])
    return y.to(x.dtype), padded[:, length:].transpose(1, 2).clone(memory_format=torch.contiguous_format)


def backward(
    grad_y: Tensor, grad_state: Tensor, x: Tensor, weight: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for x, weight and initial_state (None where absent)."""
    taps, length = weight.shape[1], x.shape[1]
    padded = _with_state(x, taps, initial_state)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    grad, kernel = grad_y.to(wide), weight.to(wide)
    d_padded = torch.zeros(padded.shape, dtype=wide, device=x.device)
    d_padded[:, length:] += grad_state.to(wide).transpose(1, 2)
    d_weight = torch.empty(weight.shape, dtype=wide, device=x.device)
    for tap in range(taps):
        d_padded[:, tap : tap + length].addcmul_(grad, kernel[:, tap])
        d_weight[:, tap] = (grad * padded[:, tap : tap + length]).sum((0, 1))
    d_initial = None
    if initial_state is not None:
        d_initial = d_padded[:, : taps - 1].transpose(1, 2).to(initial_state.dtype).contiguous()
    return d_padded[:, taps - 1 :].to(x.dtype).contiguous(), d_weight.to(weight.dtype), d_initial


def _with_state(x: Tensor, taps: int, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return torch.nn.functional.pad(x, (0, 0, taps - 1, 0))
    return torch.cat((initial_state.transpose(1, 2).to(x.dtype), x), 1)
