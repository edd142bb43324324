"""Shape checks and head grouping shared by every op folder (torch only; safe under symbolic shapes)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def require(ok: bool, op: str, message: str) -> None:
    """Raise ``ValueError`` naming the op when a caller's tensor doesn't fit its contract."""
    if not ok:
        raise ValueError(f"lincompile.{op}: {message}")


def require_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Check the number of axes; ``layout`` is the documented form, for instance ``"[B, H, T, D]"``."""
    rank = layout.count(",") + 1
    require(tensor.dim() == rank, op, f"{name} must be {layout}, got {tensor.dim()} axes {tuple(tensor.shape)}")


def require_shape(op: str, name: str, tensor: Tensor, layout: str, expected: Sequence[int]) -> None:
    """Check a whole shape. ``expected`` may hold symbolic sizes (equality then becomes a guard)."""
    require_rank(op, name, tensor, layout)
    same = all(have == want for have, want in zip(tensor.shape, expected, strict=True))
    require(same, op, f"{name} must be {layout} = {list(expected)}, got {list(tensor.shape)}")


def require_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, *, same_length: bool) -> None:
    """Check ``q [B, H, T, D]``, ``k [B, Hkv, S, D]``, ``v [B, Hkv, S, Dv]`` against one another."""
    require_rank(op, "q", q, "[B, H, T, D]")
    require_rank(op, "k", k, "[B, Hkv, S, D]")
    require_rank(op, "v", v, "[B, Hkv, S, Dv]")
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    require(kv_heads > 0 and heads % kv_heads == 0, op, f"{heads} query heads don't divide into {kv_heads} kv heads")
    keys = length if same_length else k.shape[2]
    layout = "[B, Hkv, T, D]" if same_length else "[B, Hkv, S, D]"
    require_shape(op, "k", k, layout, (batch, kv_heads, keys, head_dim))
    require_shape(op, "v", v, layout.replace("D]", "Dv]"), (batch, kv_heads, keys, v.shape[3]))
    require(q.is_floating_point() and k.is_floating_point() and v.is_floating_point(), op, "q, k, v must be float")
    require_same_device(op, q, k=k, v=v)


def require_same_device(op: str, anchor: Tensor, **tensors: Tensor | None) -> None:
    """Every given tensor must live where ``anchor`` (the op's first argument) lives."""
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.device == anchor.device, op, f"{name} is on {tensor.device}, the first on {anchor.device}")


def accumulator_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, else float32: the dtype of states and sums."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def group_heads(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, ...] -> [B, Hkv, H // Hkv, ...]``: query head ``h`` reads kv head ``h // (H // Hkv)``."""
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, *x.shape[2:])
