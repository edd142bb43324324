"""What a stretch of tokens does to a recurrent state, and how stretches are chained.

One algorithm at three scales: the chunks of the chunkwise forms (``reference.py``), the segments that a long sequence
is cut into on one GPU (``triton_launch.py``), and the slices of sequence-parallel ranks (``../sequence_parallel``).
A stretch leaves the state ``M = Σ_t e^{g_{t+1} + … + g_T} ⊙ k_tᵀ v_t`` from zero and lets ``e^a ⊙ S`` of an earlier
state S through, ``a = Σ_t g_t``; after it the state is ``e^a ⊙ S + M``.

k ``[..., T, D]``, v ``[..., T, E]``, log_decay ``[..., T, D or 1]``, states ``[..., D, E]``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def chain(added: Iterable[Tensor], passing: Iterable[Tensor] | None, state: Tensor) -> list[Tensor]:
    """``S ← passing ⊙ S + added`` over stretches in order.

    Args:
        added: the state that each stretch leaves from zero, ``[..., D, E]``.
        passing: what it lets through: a factor ``[..., D, 1]``, or a matrix ``[..., D, D]`` that is multiplied from the
            left (the delta rule); None lets everything through.
        state: the state before the first stretch.

    Returns:
        The states before each stretch and, last, after all of them.
    """
    states = [state]
    factors = iter(passing) if passing is not None else None
    for new in added:
        if factors is not None:
            factor = next(factors)
            state = factor @ state if factor.shape[-1] > 1 and factor.shape[-1] == factor.shape[-2] else factor * state
        state = state + new
        states.append(state)
    return states


def summary(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``M [..., D, E]``, and ``a [..., D, 1]`` where there is a decay. Sums are of v's dtype."""
    if log_decay is None:
        return k.transpose(-1, -2) @ v, None
    written = k * suffix_exclusive(log_decay).exp()
    return written.transpose(-1, -2) @ v, log_decay.expand(k.shape).sum(-2).unsqueeze(-1)


def summary_backward(
    d_state: Tensor, d_total: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``summary`` for k, v and log_decay, from those of ``M [..., D, E]`` and ``a [..., D, 1]``."""
    d_written = v @ d_state.transpose(-1, -2)
    if log_decay is None:
        return d_written, k @ d_state, None
    to_end = suffix_exclusive(log_decay).exp()
    written = k * to_end
    d_decay = prefix_exclusive(written * d_written)
    if d_total is not None:
        d_decay = d_decay + d_total.transpose(-1, -2)
    if log_decay.shape[-1] != k.shape[-1]:
        d_decay = d_decay.sum(-1, keepdim=True)
    return d_written * to_end, written @ d_state, d_decay


def suffix_inclusive(x: Tensor) -> Tensor:
    """Sums from each row to the last."""
    return x.flip(-2).cumsum(-2).flip(-2)


def suffix_exclusive(x: Tensor) -> Tensor:
    """Sums of later rows only; written without a subtraction, so that ``-inf`` never meets ``-inf``."""
    return suffix_inclusive(F.pad(x[..., 1:, :], (0, 0, 0, 1)))


def prefix_exclusive(x: Tensor) -> Tensor:
    """Sums of earlier rows only."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def packed(state: Tensor, total: Tensor | None) -> Tensor:
    """``[M | a]``: what travels between ranks."""
    return state if total is None else torch.cat((state, total.to(state.dtype)), -1)
