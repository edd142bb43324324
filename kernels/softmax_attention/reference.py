"""Softmax attention on un-expanded KV heads: the definition, and a form that never holds all T x S scores.

``q [B, H, T, D]``, ``k [B, Hkv, S, D]``, ``v [B, Hkv, S, Dv]``, ``key_padding [B, S]`` (True = real). Alignment is
bottom-right: query ``i`` of ``T`` sits at key position ``i + S - T``. A row that sees no key gives 0 and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import accumulator_dtype, group_heads

KINDS = ("full", "causal", "sliding")
ROWS = 512
NARROW = 256  # windows up to here take the banded backward pass
SLAB = 1 << 28  # scores it holds at once


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """All scores at once, differentiable by plain autograd: what the other forms are tested against."""
    rows = torch.arange(q.shape[2], device=q.device)
    visible = _visible(rows, torch.arange(k.shape[2], device=q.device), q.shape[2], k.shape[2], kind, window)
    if key_padding is not None:
        visible = visible & key_padding[:, None, None, None, :]
    weights, _ = _weights(group_heads(q, k.shape[1]), k.unsqueeze(2), visible, scale, softcap)
    return (weights @ v.to(weights.dtype).unsqueeze(2)).flatten(1, 2).to(v.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Returns contiguous ``o [B, H, T, Dv]`` in v's dtype, through torch's fused SDPA wherever it means the same."""
    length, keys = q.shape[2], k.shape[2]
    if unmasked(q, k, v, key_padding, kind, softcap):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=kind == "causal", scale=scale, enable_gqa=True)
        return out.contiguous() if keys else out.new_zeros(out.shape)
    fusable = softcap == 0 and q.dtype == k.dtype == v.dtype
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    for rows, cols, visible in _blocks(length, keys, key_padding, kind, window, q.device):
        q_part, k_part, v_part = q[:, :, rows], k[:, :, cols], v[:, :, cols]
        if fusable:
            part = F.scaled_dot_product_attention(
                q_part, k_part, v_part, attn_mask=visible.flatten(1, 2), scale=scale, enable_gqa=True
            )
            # Backends disagree on rows without a visible key (0 or NaN): the contract says 0.
            out[:, :, rows] = part.masked_fill(~visible.flatten(1, 2).any(-1, keepdim=True), 0.0)
        else:
            weights, _ = _weights(group_heads(q_part, k.shape[1]), k_part.unsqueeze(2), visible, scale, softcap)
            out[:, :, rows] = (weights @ v_part.to(weights.dtype).unsqueeze(2)).flatten(1, 2).to(v.dtype)
    return out


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
    attend: Callable[..., Tensor] = forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """``k, v [B, Hkv, t, ·]`` after the caches, and what the t queries see there, by ``attend``.

    Returns ``o [B, H, t, Dv]`` and the contiguous caches ``[B, Hkv, P + t, ·]``; ``key_padding [B, P + t]``.
    """
    # cat keeps a layout with adjacent channels of heads; the op's fake promises contiguous caches
    keys, values = (torch.cat(pair, 2).contiguous() for pair in ((k_cache, k), (v_cache, v)))
    return attend(q, keys, values, key_padding, kind, window, scale, softcap), keys, values


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact gradients for q, k, v; weights are recomputed one block of rows at a time."""
    if kind == "sliding" and q.shape[2] == k.shape[2] and window <= min(NARROW, q.shape[2] // 2):
        return _banded_backward(grad_o, q, k, v, key_padding, window, scale, softcap)
    dtype = accumulator_dtype(q, k, v)
    d_q = torch.zeros(q.shape, dtype=dtype, device=q.device)
    d_k = torch.zeros(k.shape, dtype=dtype, device=q.device)
    d_v = torch.zeros(v.shape, dtype=dtype, device=q.device)
    for rows, cols, visible in _blocks(q.shape[2], k.shape[2], key_padding, kind, window, q.device):
        q_part = group_heads(q[:, :, rows], k.shape[1]).to(dtype)
        grad = group_heads(grad_o[:, :, rows], k.shape[1]).to(dtype)
        k_part, v_part = k[:, :, cols].to(dtype).unsqueeze(2), v[:, :, cols].to(dtype).unsqueeze(2)
        weights, slope = _weights(q_part, k_part, visible, scale, softcap)
        d_scores = grad @ v_part.transpose(-1, -2)
        d_scores = weights * (d_scores - (weights * d_scores).sum(-1, keepdim=True)) * scale
        if slope is not None:
            d_scores = d_scores * slope
        d_q[:, :, rows] = (d_scores @ k_part).flatten(1, 2)
        d_k[:, :, cols] += d_scores.flatten(2, 3).transpose(-1, -2) @ q_part.flatten(2, 3)
        d_v[:, :, cols] += weights.flatten(2, 3).transpose(-1, -2) @ grad.flatten(2, 3)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def unmasked(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, kind: str, softcap: float) -> bool:
    """Whether torch's SDPA means the same without a mask."""
    shape = kind == "full" or (kind == "causal" and q.shape[2] == k.shape[2])
    return shape and key_padding is None and softcap == 0 and q.dtype == k.dtype == v.dtype


def _banded_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A narrow window's gradients: tokens in blocks of ``window``, which see their own block and the one before.

    All blocks at once, ``2 · window`` scores a query; very long sequences in slabs of ``SLAB`` scores.
    """
    dtype = accumulator_dtype(q, k, v)
    batch, heads, length, _ = q.shape
    kv_heads, count = k.shape[1], -(-length // window)
    extra = count * window - length
    # a block of zeros before the first one, and the last one filled up; nothing in either is visible
    queries, grads = (F.pad(x, (0, 0, 0, extra)) for x in (q, grad_o))
    keys, values = (F.pad(x, (0, 0, window, extra)) for x in (k, v))
    real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if key_padding is None else key_padding
    real = F.pad(real, (window, extra))
    steps = torch.arange(window, device=q.device)
    distance = steps[:, None] + window - torch.arange(2 * window, device=q.device)
    band = (distance >= 0) & (distance < window)
    d_q = torch.empty(batch, heads, count * window, q.shape[3], dtype=dtype, device=q.device)
    d_k, d_v = (torch.zeros(*x.shape, dtype=dtype, device=q.device) for x in (keys, values))
    size = max(1, SLAB // (batch * heads * 2 * window * window))
    for first in range(0, count, size):
        blocks = min(size, count - first)
        rows = slice(first * window, (first + blocks) * window)
        span = slice(first * window, (first + blocks + 1) * window)

        def split(x: Tensor, rows: slice = rows, blocks: int = blocks) -> Tensor:
            return torch.unflatten(group_heads(x[:, :, rows], kv_heads), 3, (blocks, window)).to(dtype)

        def spread(x: Tensor, axis: int, span: slice = span) -> Tensor:
            """Overlapping stretches of two blocks as a new axis before the token axis."""
            part = x[:, span] if axis == 1 else x[:, :, span]
            return part.unfold(axis, 2 * window, window)

        q_part, grad = split(queries), split(grads)  # [B, Hkv, R, n, W, D]
        k_part, v_part = (spread(x, 2).transpose(-1, -2).unsqueeze(2).to(dtype) for x in (keys, values))
        visible = band & spread(real, 1)[:, None, None, :, None, :]
        weights, slope = _weights(q_part, k_part, visible, scale, softcap)
        d_scores = grad @ v_part.transpose(-1, -2)
        d_scores = weights * (d_scores - (weights * d_scores).sum(-1, keepdim=True)) * scale
        if slope is not None:
            d_scores = d_scores * slope
        d_q[:, :, rows] = (d_scores @ k_part).flatten(3, 4).flatten(1, 2)
        for total, part in ((d_k, d_scores.transpose(-1, -2) @ q_part), (d_v, weights.transpose(-1, -2) @ grad)):
            both = part.sum(2)  # [B, Hkv, n, 2W, D]: each block's share for the block before and for its own
            before, own = both[:, :, :, :window].flatten(2, 3), both[:, :, :, window:].flatten(2, 3)
            total[:, :, rows] += before
            total[:, :, span.start + window : span.stop] += own
    tokens = slice(window, window + length)
    return d_q[:, :, :length].to(q.dtype), d_k[:, :, tokens].to(k.dtype), d_v[:, :, tokens].to(v.dtype)


def _weights(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Attention weights ``[B, G, R, t, s]`` and the soft cap's derivative (None without a cap)."""
    dtype = accumulator_dtype(q, k)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    slope = None
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped * capped
    weights = scores.masked_fill(~visible, torch.finfo(dtype).min).softmax(-1)
    return weights.masked_fill(~visible, 0.0), slope


def _visible(rows: Tensor, cols: Tensor, length: int, keys: int, kind: str, window: int) -> Tensor:
    """Which keys each row sees, ``[1, 1, 1, t, s]``."""
    distance = rows[:, None] + (keys - length) - cols[None, :]
    if kind == "full":
        visible = torch.ones_like(distance, dtype=torch.bool)
    elif kind == "causal":
        visible = distance >= 0
    else:
        visible = (distance >= 0) & (distance < window)
    return visible[None, None, None]


def _blocks(
    length: int, keys: int, key_padding: Tensor | None, kind: str, window: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of query rows with the key range they can see and its mask ``[B or 1, 1, 1, t, s]``."""
    for first in range(0, length, ROWS):
        last = min(first + ROWS, length)
        end = keys if kind == "full" else min(keys, last + keys - length)
        start = max(0, first + keys - length - window + 1) if kind == "sliding" else 0
        if end <= start:
            continue
        rows, cols = torch.arange(first, last, device=device), torch.arange(start, end, device=device)
        visible = _visible(rows, cols, length, keys, kind, window)
        if key_padding is not None:
            visible = visible & key_padding[:, None, None, None, start:end]
        yield slice(first, last), slice(start, end), visible
