"""What a LAWCAT recurrence (arXiv 2509.18467) reads of a token: features of q and k, and the log-decays.

The definition: ``hedgehog_features`` of the queries and of the keys, and ``decay_gate`` of the hidden states' low-rank
projection, whose RMS norm may come with it. Shapes: ``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from ..decay_gate import reference as decay_gate
from ..hedgehog_features import reference as hedgehog_features


class Inputs(NamedTuple):
    """The op's arguments, in order."""

    q: Tensor  # [B, H, T, D]
    conv_q: Tensor  # [H * D, W]
    state_q: Tensor  # [B, H * D, W - 1]
    map_q: Tensor  # [M, D, D]: one map for each H // M heads
    bias_q: Tensor  # [M, 1, D]
    k: Tensor  # [B, Hkv, T, D], and so on as for q
    conv_k: Tensor
    state_k: Tensor
    map_k: Tensor
    bias_k: Tensor
    x: Tensor  # [B, T, C]: hidden states
    norm_weight: Tensor | None  # [C]: of their RMS norm, where it comes with them
    down: Tensor  # [R, C]
    up: Tensor  # [Hkv * F, R]
    gate_bias: Tensor  # [Hkv * F]
    mask: Tensor | None  # [B, T] bool, True = real token
    eps: float
    kv_heads: int
    temperature: float
    lowest: float | None


def forward(
    *args: Any,
    features: Callable[..., Any] = hedgehog_features.forward,
    gate: Callable[..., Any] = decay_gate.forward,
) -> tuple[Tensor, ...]:
    """``(feature_q, feature_k, log_decay, state_q, state_k)`` of :class:`Inputs`; ``features`` and ``gate`` compute
    their parts.
    """
    given = Inputs(*args)
    x, mask = given.x, given.mask
    if given.norm_weight is not None:
        x = functional.rms_norm(x, (x.shape[-1],), given.norm_weight, given.eps)
    feature_q, state_q = features(*given[:5], mask, False)
    feature_k, state_k = features(*given[5:10], mask, True)
    z = functional.linear(x, given.down)
    log_decay = gate(z, given.up, given.gate_bias, mask, given.kv_heads, given.temperature, given.lowest)
    return feature_q, feature_k, log_decay, state_q, state_k
