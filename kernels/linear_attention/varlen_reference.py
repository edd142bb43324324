"""The readable form of ``linear_attention_varlen``: each sequence by itself, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import Grads, chunkwise, chunkwise_backward


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    lengths: tuple[int, ...],
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """``chunkwise`` (causal) of each of the sequences that lie side by side in ``q, k, v [1, ·, T, ·]``.

    States are ``[sequences, Hkv, D, E]``.
    """
    outputs, states = [], []
    for rows, own in _sequences(lengths):
        g = None if log_decay is None else log_decay[:, :, rows]
        start = None if initial_state is None else initial_state[own]
        o, state = chunkwise(q[:, :, rows], k[:, :, rows], v[:, :, rows], g, start, scale, True, normalize)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 2), torch.cat(states, 0)


def backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    lengths: tuple[int, ...],
    scale: float,
    normalize: bool,
) -> Grads:
    """Gradients of ``forward``."""
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_g = None if log_decay is None else torch.empty_like(log_decay)
    d_initial = None if initial_state is None else torch.empty_like(initial_state)
    for rows, own in _sequences(lengths):
        g = None if log_decay is None else log_decay[:, :, rows]
        start = None if initial_state is None else initial_state[own]
        part = (q[:, :, rows], k[:, :, rows], v[:, :, rows], g, start, scale, True, normalize)
        grads = chunkwise_backward(grad_o[:, :, rows], grad_state[own], *part)
        d_q[:, :, rows], d_k[:, :, rows], d_v[:, :, rows] = grads[:3]
        if d_g is not None and grads[3] is not None:
            d_g[:, :, rows] = grads[3]
        if d_initial is not None and grads[4] is not None:
            d_initial[own] = grads[4]
    return d_q, d_k, d_v, d_g, d_initial


def _sequences(lengths: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Rows and number of each sequence."""
    start = 0
    for number, length in enumerate(lengths):
        yield slice(start, start + length), slice(number, number + 1)
        start += length
