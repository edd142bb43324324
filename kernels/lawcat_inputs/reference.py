"""What a LAWCAT recurrence (arXiv 2509.18467) reads of a token: features of q and k, and the log-decays.

The definition: ``hedgehog_features`` of the queries and of the keys, and ``decay_gate`` of the hidden states' low-rank
projection, whose RMS norm may come with it. Shapes: ``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..decay_gate import reference as decay_gate
from ..hedgehog_features import reference as hedgehog_features


def forward(
    q: Tensor, conv_q: Tensor, state_q: Tensor, map_q: Tensor, bias_q: Tensor,
    k: Tensor, conv_k: Tensor, state_k: Tensor, map_k: Tensor, bias_k: Tensor,
    x: Tensor, norm_weight: Tensor | None, down: Tensor, up: Tensor, gate_bias: Tensor, mask: Tensor | None,
    eps: float, kv_heads: int, temperature: float,
    features: Callable[..., Any] = hedgehog_features.forward, gate: Callable[..., Any] = decay_gate.forward,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``(feature_q, feature_k, log_decay, state_q, state_k)``; ``features`` and ``gate`` compute their parts."""
    if norm_weight is not None:
        x = functional.rms_norm(x, (x.shape[-1],), norm_weight, eps)
    feature_q, state_q = features(q, conv_q, state_q, map_q, bias_q, mask, False)
    feature_k, state_k = features(k, conv_k, state_k, map_k, bias_k, mask, True)
    log_decay = gate(functional.linear(x, down), up, gate_bias, mask, kv_heads, temperature)
    return feature_q, feature_k, log_decay, state_q, state_k
