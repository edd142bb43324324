"""Tokens that count as several of themselves in the recurrence of linear attention.

r copies of a token, one after another (the same k, v and log-decay g), take a state S to e^(r·g) S + w·kᵀv with
w = 1 + e^g + … + e^((r−1)·g). That is one token again, of r times the log-decay and a scaled key: the normaliser, the
state's ones-column, goes with the key. So a short window trains a state to hold what it has to through a long one.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 1 << 20  # copies of a token


def repeated(k: Tensor, log_decay: Tensor, repeats: Tensor, lowest: float | None) -> tuple[Tensor, Tensor]:
    """Keys ``[B, Hkv, T, D]`` and log-decays, as if each token stood there several times in a row.

    Args:
        log_decay: ``[B, Hkv, T, D]`` or ``[B, Hkv, T, 1]``, up to 0, which is no decay.
        repeats: copies of each token, from 1 to ``MOST``, ``[B, T]``.
        lowest: floor of the result's log-decays, as of those given (None: no floor).
    """
    each = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32))
    times = repeats[:, None, :, None].to(each.dtype)
    total = times * each
    if lowest is not None:
        # The kernels' fast way needs the floor. A feature that would pass it counts as the copies that reach it (1/e is
        # left of what was before them): at that pace all is gone after a few tokens anyway.
        times = torch.where(total < lowest, lowest / each.clamp(max=lowest / MOST), times)
        total = total.clamp(min=lowest)
    weight = times * (_mean_decay(total) / _mean_decay(each))
    return (k * weight).to(k.dtype), total.to(log_decay.dtype)


def _mean_decay(x: Tensor) -> Tensor:
    """(eˣ − 1) / x, and 1 at 0. Near 0 by its series: of the quotient's gradient rounding would leave nothing."""
    near = x.abs() < 0.01
    small = torch.where(near, x, 0.0)
    series = 1 + small / 2 * (1 + small / 3 * (1 + small / 4 * (1 + small / 5 * (1 + small / 6))))
    other = torch.where(near, -1.0, x)
    return torch.where(near, series, torch.expm1(other) / other)
