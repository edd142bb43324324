# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Sliding-window softmax attention on a GPU: only the blocks of keys that a block of queries can see are touched.

Forward: a program takes 64 queries of one head and walks over their blocks of keys with a running softmax
(FlashAttention's, https://arxiv.org/abs/2205.14135). Backward, two kernels. By blocks of queries: the forward once
more, the log-sum-exp of each row, the products of o and its gradient, dq. By blocks of keys of one KV head: dk and dv
over all query heads of the group. No atomics: two runs agree to the bit.

bfloat16 and float16 inputs multiply on tensor cores of that type with float32 sums; float32 inputs in three TF32
products. Alignment is bottom-right, as in ``reference.py``: query i sits at key position i + S - T.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launcher
from ..linear_attention.triton_blocks import load_rows, store_rows
from ..triton_device import COUNTS, INTERPRETED, LOG2E, mask_bytes, shared_memory

# Heads are padded to blocks of 64 or 128 and tiles have 64 rows: the widths of Hopper's matrix unit that are used
# everywhere here. Loops are not pipelined: they have two or three turns, and other programs fill the waits.
BLOCK = 64
WIDEST = 128
LONGEST = 1024  # windows; beyond it most blocks need no mask, and kernels that know it serve better
# Bytes of shared memory by bytes of an element; compiled for Hopper the kernels take at most 64 and 192 KiB.
SHARED_MEMORY = {2: 96 * 1024, 4: 200 * 1024}
FAR_APART = 1 << 24  # tokens this many elements apart: 64 of them wouldn't fit 32-bit offsets


@triton.jit
def soft_cap(s, softcap):
    """tanh(s / softcap) without overflow."""
    return 1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0)


@triton.jit
def key_range(first, T, S, WINDOW, BM: tl.constexpr, BN: tl.constexpr):
    """Blocks of keys, from … to (exclusive), that queries ``first … first + BM`` see."""
    low = tl.maximum(first + (S - T) - WINDOW + 1, 0) // BN
    end = tl.minimum(tl.maximum(tl.minimum(first + BM, T) + (S - T), 0), S)
    return low, (end + BN - 1) // BN


@triton.jit
def sees(at, keys, padding, T, S, WINDOW, PADDED: tl.constexpr):
    """Which of ``keys [1, BN]`` the queries ``at [BM, 1]`` see (or ``[BN, 1]`` and ``[1, BM]``)."""
    distance = at + (S - T) - keys
    visible = (distance >= 0) & (distance < WINDOW) & (keys < S) & (at < T)
    if PADDED:
        visible = visible & (tl.load(padding + keys, mask=keys < S, other=0) != 0)
    return visible


@triton.jit
def attend(
    rows, k, v, padding, k_t, v_t, first, T, S, WINDOW, D, E, scale, softcap, PADDED: tl.constexpr,
    CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``o [BM, BE]`` of the queries ``rows`` and the base-2 log-sum-exp of their scores: +inf where no key is seen,
    so that every weight recomputed from it is 0.
    """
    at = first + tl.arange(0, BM)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BE], tl.float32)
    low, high = key_range(first, T, S, WINDOW, BM, BN)
    for block in tl.range(low, high, num_stages=1):
        start = block * BN
        keys = start + tl.arange(0, BN)
        k_rows = load_rows(k, k_t, start, S, D, BN, BD).to(DOT)
        s = tl.dot(rows, tl.trans(k_rows), input_precision=PRECISION) * scale
        if CAPPED:
            s = soft_cap(s, softcap) * softcap
        s = tl.where(sees(at[:, None], keys[None, :], padding, T, S, WINDOW, PADDED), s * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(s - shift[:, None])
        kept = tl.exp2(top - shift)
        total = total * kept + tl.sum(weights, 1)
        v_rows = load_rows(v, v_t, start, S, E, BN, BE).to(DOT)
        out = tl.dot(weights.to(DOT), v_rows, acc=out * kept[:, None], input_precision=PRECISION)
        top = higher
    divisor = tl.where(total > 0, total, 1.0)
    return out / divisor[:, None], tl.where(total > 0, top + tl.log2(divisor), float("inf"))


@triton.jit(do_not_specialize=COUNTS)
def sliding_forward(
    q, k, v, padding, out, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T, S, GROUP, WINDOW, D, E, scale, softcap,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, T, E]`` of BM queries of one head."""
    problem, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM
    batch, head = problem // H, problem % H
    own = padding
    if PADDED:
        own = padding + batch * S
    rows = load_rows(q + batch * q_b + head * q_h, q_t, first, T, D, BM, BD).to(DOT)
    o, _ = attend(
        rows, k + batch * k_b + head // GROUP * k_h, v + batch * v_b + head // GROUP * v_h, own, k_t, v_t, first,
        T, S, WINDOW, D, E, scale, softcap, PADDED, CAPPED, BM, BN, BD, BE, DOT, PRECISION,
    )  # fmt: skip
    store_rows(out + problem * T * E, E, first, T, E, o, BM, BE)


@triton.jit(do_not_specialize=COUNTS)
def query_gradients(
    grad, q, k, v, padding, d_q, sums, deltas, g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    H, T, S, GROUP, WINDOW, D, E, scale, softcap,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_q [B, H, T, D]`` of BM queries of one head, and for ``key_gradients`` their log-sum-exp and ``o · grad``,
    both ``[B, H, T]`` in float32.
    """
    problem, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM
    batch, head = problem // H, problem % H
    own = padding
    if PADDED:
        own = padding + batch * S
    k_base, v_base = k + batch * k_b + head // GROUP * k_h, v + batch * v_b + head // GROUP * v_h
    at = first + tl.arange(0, BM)
    rows = load_rows(q + batch * q_b + head * q_h, q_t, first, T, D, BM, BD).to(DOT)
    o, level = attend(
        rows, k_base, v_base, own, k_t, v_t, first,
        T, S, WINDOW, D, E, scale, softcap, PADDED, CAPPED, BM, BN, BD, BE, DOT, PRECISION,
    )  # fmt: skip
    slopes = load_rows(grad + batch * g_b + head * g_h, g_t, first, T, E, BM, BE).to(DOT)
    delta = tl.sum(o * slopes.to(tl.float32), 1)
    tl.store(sums + problem * T + at, level, mask=at < T)
    tl.store(deltas + problem * T + at, delta, mask=at < T)
    total = tl.zeros([BM, BD], tl.float32)
    low, high = key_range(first, T, S, WINDOW, BM, BN)
    for block in tl.range(low, high, num_stages=1):
        start = block * BN
        keys = start + tl.arange(0, BN)
        k_rows = load_rows(k_base, k_t, start, S, D, BN, BD).to(DOT)
        s = tl.dot(rows, tl.trans(k_rows), input_precision=PRECISION) * scale
        v_rows = load_rows(v_base, v_t, start, S, E, BN, BE).to(DOT)
        d_s = tl.dot(slopes, tl.trans(v_rows), input_precision=PRECISION) - delta[:, None]
        if CAPPED:
            capped = soft_cap(s, softcap)
            s = capped * softcap
            d_s = d_s * (1.0 - capped * capped)
        visible = sees(at[:, None], keys[None, :], own, T, S, WINDOW, PADDED)
        d_s = tl.where(visible, tl.exp2(s * LOG2E - level[:, None]) * d_s, 0.0)
        total = tl.dot(d_s.to(DOT), k_rows, acc=total, input_precision=PRECISION)
    store_rows(d_q + problem * T * D, D, first, T, D, total * scale, BM, BD)


@triton.jit(do_not_specialize=COUNTS)
def key_gradients(
    grad, q, k, v, padding, sums, deltas, d_k, d_v, g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    HKV, T, S, GROUP, WINDOW, D, E, scale, softcap,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_k [B, Hkv, S, D]`` and ``d_v [B, Hkv, S, E]`` of BN keys of one KV head. Scores are computed transposed,
    ``[BN, BM]``, so that no sum has to be turned round for its next product.
    """
    problem, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    batch, kv_head = problem // HKV, problem % HKV
    own = padding
    if PADDED:
        own = padding + batch * S
    keys = start + tl.arange(0, BN)
    k_rows = load_rows(k + batch * k_b + kv_head * k_h, k_t, start, S, D, BN, BD).to(DOT)
    v_rows = load_rows(v + batch * v_b + kv_head * v_h, v_t, start, S, E, BN, BE).to(DOT)
    total_k = tl.zeros([BN, BD], tl.float32)
    total_v = tl.zeros([BN, BE], tl.float32)
    # Key j is seen by the queries j - (S - T) … j - (S - T) + WINDOW - 1.
    low = tl.maximum(start - (S - T), 0) // BM
    end = tl.minimum(tl.maximum(tl.minimum(start + BN, S) - (S - T) + WINDOW - 1, 0), T)
    count = tl.maximum((end + BM - 1) // BM - low, 0)
    for step in tl.range(0, GROUP * count, num_stages=1):
        head = kv_head * GROUP + step // count
        first = (low + step % count) * BM
        at = first + tl.arange(0, BM)
        rows = load_rows(q + batch * q_b + head * q_h, q_t, first, T, D, BM, BD).to(DOT)
        slopes = load_rows(grad + batch * g_b + head * g_h, g_t, first, T, E, BM, BE).to(DOT)
        place = (batch * HKV * GROUP + head) * T + at
        level = tl.load(sums + place, mask=at < T, other=0.0)
        delta = tl.load(deltas + place, mask=at < T, other=0.0)
        s = tl.dot(k_rows, tl.trans(rows), input_precision=PRECISION) * scale
        d_s = tl.dot(v_rows, tl.trans(slopes), input_precision=PRECISION) - delta[None, :]
        if CAPPED:
            capped = soft_cap(s, softcap)
            s = capped * softcap
            d_s = d_s * (1.0 - capped * capped)
        visible = sees(at[None, :], keys[:, None], own, T, S, WINDOW, PADDED)
        weights = tl.where(visible, tl.exp2(s * LOG2E - level[None, :]), 0.0)
        total_v = tl.dot(weights.to(DOT), slopes, acc=total_v, input_precision=PRECISION)
        d_s = tl.where(visible, weights * d_s, 0.0)
        total_k = tl.dot(d_s.to(DOT), rows, acc=total_k, input_precision=PRECISION)
    store_rows(d_k + problem * S * D, D, start, S, D, total_k * scale, BN, BD)
    store_rows(d_v + problem * S * E, E, start, S, E, total_v, BN, BE)


def supports(q: Tensor, k: Tensor, v: Tensor, kind: str, window: int) -> bool:
    """Whether these kernels serve a call: sliding windows of at most 1024 keys; q, k and v all bfloat16, float16 or
    float32; heads of at most 128 channels; at least one token; enough shared memory. Any alignment, padding and soft
    cap. The reference serves the others, on the same device.
    """
    return (
        kind == "sliding"
        and window <= LONGEST
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.dtype == k.dtype == v.dtype
        and min(*q.shape, *k.shape, *v.shape) > 0
        and max(q.shape[3], v.shape[3]) <= WIDEST
        and shared_memory(q.device) >= SHARED_MEMORY[q.element_size()]
    )


def adjacent(x: Tensor) -> Tensor:
    """The same tensor with adjacent channels, and tokens not too far apart."""
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < FAR_APART else x.contiguous()


def _options(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, window: int, scale: float, softcap: float
) -> tuple[list[Any], dict[str, Any]]:
    """What all three kernels take last: T, S, GROUP … softcap, and their constants."""
    numbers = [q.shape[2], k.shape[2], q.shape[1] // k.shape[1], window, q.shape[3], v.shape[3], scale, softcap]
    narrow = q.dtype != torch.float32 and not INTERPRETED
    dots = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    least = 16 if INTERPRETED else 64
    return numbers, {
        "PADDED": key_padding is not None, "CAPPED": softcap != 0, "BM": BLOCK, "BN": BLOCK,
        "BD": max(least, triton.next_power_of_2(q.shape[3])), "BE": max(least, triton.next_power_of_2(v.shape[3])),
        "DOT": dots[q.dtype] if narrow else tl.float32, "PRECISION": "ieee" if narrow else "tf32x3",
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip


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
    """See ``reference.forward``; for calls that ``supports`` accepts."""
    batch, heads, length, _ = q.shape
    numbers, options = _options(q, k, v, key_padding, window, scale, softcap)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    out = v.new_empty(batch, heads, length, v.shape[3])
    launcher(sliding_forward, (batch * heads, triton.cdiv(length, options["BM"])))(
        q, k, v, mask_bytes(key_padding), out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, *numbers,
        **options,
    )  # fmt: skip
    return out


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
    """See ``reference.backward``; for calls that ``supports`` accepts."""
    (batch, heads, length, _), kv_heads, keys = q.shape, k.shape[1], k.shape[2]
    numbers, options = _options(q, k, v, key_padding, window, scale, softcap)
    q, k, v, grad, mask = adjacent(q), adjacent(k), adjacent(v), adjacent(grad_o.to(v.dtype)), mask_bytes(key_padding)
    strides = [step for x in (grad, q, k, v) for step in x.stride()[:3]]
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    sums, deltas = (q.new_empty(batch, heads, length, dtype=torch.float32) for _ in range(2))
    launcher(query_gradients, (batch * heads, triton.cdiv(length, options["BM"])))(
        grad, q, k, v, mask, d_q, sums, deltas, *strides, heads, *numbers, **options
    )
    launcher(key_gradients, (batch * kv_heads, triton.cdiv(keys, options["BN"])))(
        grad, q, k, v, mask, sums, deltas, d_k, d_v, *strides, kv_heads, *numbers, **options
    )
    return d_q, d_k, d_v
