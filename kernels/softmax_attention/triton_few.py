# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Softmax attention of few queries on a GPU, a decoded token above all: the keys are what has to be read.

The queries of all heads that share a KV head are the rows of one tile. A program walks over a share of the keys with a
running softmax (FlashAttention's, https://arxiv.org/abs/2205.14135). Shares lie side by side on the grid (flash-
decoding), and the last program of a KV head to end adds them up in their order, so that two runs agree to the bit. A
counter in memory tells a program whether it is the last, which sets it back to 0. The step form copies the caches on
the way: each key is read once, from the old cache or from what is appended, and written to the new one.

On Hopper it is chained (:func:`..triton_device.chained`). The kernel in front may still be writing everything that is
read here; until it ends, keys are only brought into the L2 cache, where what it writes is seen.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..compile_ahead import launcher
from ..triton_device import COUNTS, INTERPRETED, LOG2E, chained, processors, shared_memory
from .triton import adjacent, soft_cap

ROWS = 32  # of a tile: queries times the heads of a KV head
WIDEST = 256  # channels of a head
LONGEST = 1 << 30  # keys
LEAST = 64  # keys of a program, where there are as many
TILE = 1 << 14  # bytes of a block of keys
COMBINED = 1 << 13  # numbers that are added up at once
SHARED_MEMORY = 140 * 1024  # bytes; compiled for Hopper the kernel takes at most 132 KiB
FOREVER = (1 << 31) - 1  # the window of a query that sees all before it
COUNTERS = 1 << 16


@triton.jit
def places(old, new, old_t, new_t, keys, P, STEP: tl.constexpr):
    """Where each of ``keys [BN]`` begins: in the cache of P keys or (without STEP always) in what follows on it."""
    where = keys.to(tl.int64)
    if STEP:
        return tl.where(keys < P, old + where * old_t, new + (where - P) * new_t)
    else:
        return new + where * new_t


@triton.jit
def prefetch(rows, D: tl.constexpr):
    """Asks for these rows of D channels in the L2 cache, a line of 128 bytes at a time."""
    SIZE: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(D * SIZE, 128))
    column = tl.minimum(tl.arange(0, LINES) * (128 // SIZE), D - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [(rows[:, None] + column[None, :]).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def combine(out, parts, tops, totals, problem, SHARES, COUNT, E: tl.constexpr, BE: tl.constexpr, RB: tl.constexpr,
            SB: tl.constexpr):  # fmt: skip
    """Writes ``out [COUNT, E]`` of one problem: its shares added up, SB at a time, in their order.

    Other programs have written them a moment ago: they are read from the L2 cache.
    """
    row, column = tl.arange(0, RB), tl.arange(0, BE)
    top = tl.full([RB], float("-inf"), tl.float32)
    total = tl.zeros([RB], tl.float32)
    sums = tl.zeros([RB, BE], tl.float32)
    for first in tl.range(0, SHARES, SB, num_stages=1):
        share = first + tl.arange(0, SB)
        line = (problem * SHARES + share)[:, None] * COUNT + row[None, :]
        inside = (share < SHARES)[:, None] & (row < COUNT)[None, :]
        place = line[:, :, None] * E + column[None, None, :]
        part = tl.load(
            parts + place, mask=inside[:, :, None] & (column < E)[None, None, :], other=0.0, cache_modifier=".cg"
        )
        highest = tl.load(tops + line, mask=inside, other=float("-inf"), cache_modifier=".cg")
        weight = tl.load(totals + line, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(highest, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        kept, factor = tl.exp2(top - shift), tl.exp2(highest - shift[None, :])
        total = total * kept + tl.sum(weight * factor, 0)
        sums = sums * kept[:, None] + tl.sum(part * factor[:, :, None], 0)
        top = higher
    sums /= tl.where(total > 0, total, 1.0)[:, None]
    inside = (row < COUNT)[:, None] & (column < E)[None, :]
    tl.store(out + row[:, None] * E + column[None, :], sums.to(out.dtype.element_ty), mask=inside)


NUMBERS: list[str] = [*COUNTS, "P", "GROUP", "WINDOW", "FIRST", "PER_SHARE", "p_b", "p_t"]


@triton.jit(do_not_specialize=NUMBERS)
def few_queries(
    q, k, v, k_cache, v_cache, padding, out, k_out, v_out, parts, counters,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, kc_b, kc_h, kc_t, vc_b, vc_h, vc_t, p_b, p_t,
    HKV, T, S, P, GROUP, WINDOW, FIRST, PER_SHARE, scale, softcap, D: tl.constexpr, E: tl.constexpr,
    STEP: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, RB: tl.constexpr, SB: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PER_SHARE blocks of BN keys of one KV head, from block FIRST on. Keys before P are in ``k_cache, v_cache`` (STEP
    only), the others in ``k, v``. With several shares ``parts`` takes the sums, the largest score and the sum of
    weights of every row: ``[B·Hkv, shares, GROUP·T, E]`` and twice ``[B·Hkv, shares, GROUP·T]`` in float32.
    """
    problem, share, SHARES = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    batch, kv_head = problem // HKV, problem % HKV
    COUNT = GROUP * T
    k_new, v_new = k + batch * k_b + kv_head * k_h, v + batch * v_b + kv_head * v_h
    k_old, v_old = k_cache + batch * kc_b + kv_head * kc_h, v_cache + batch * vc_b + kv_head * vc_h
    low = FIRST + share * PER_SHARE
    high = tl.minimum(low + PER_SHARE, tl.cdiv(S, BN))
    if PDL:
        gdc_launch_dependents()
        near = tl.minimum(low * BN + tl.arange(0, BN), S - 1)
        prefetch(places(k_old, k_new, kc_t, k_t, near, P, STEP), D)
        prefetch(places(v_old, v_new, vc_t, v_t, near, P, STEP), E)
        gdc_wait()
    row = tl.arange(0, BM)
    head, at = row // T, row % T
    channel, column = tl.arange(0, BD), tl.arange(0, BE)
    place = batch * q_b + (kv_head * GROUP + head) * q_h + at * q_t
    rows = tl.load(
        q + place[:, None] + channel[None, :], mask=(row < COUNT)[:, None] & (channel < D)[None, :], other=0.0
    ).to(DOT)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, BE], tl.float32)
    for block in tl.range(low, high, num_stages=STAGES):
        key = block * BN + tl.arange(0, BN)
        k_inside, v_inside = (key < S)[:, None] & (channel < D)[None, :], (key < S)[:, None] & (column < E)[None, :]
        k_row, v_row = places(k_old, k_new, kc_t, k_t, key, P, STEP), places(v_old, v_new, vc_t, v_t, key, P, STEP)
        k_rows = tl.load(k_row[:, None] + channel[None, :], mask=k_inside, other=0.0)
        v_rows = tl.load(v_row[:, None] + column[None, :], mask=v_inside, other=0.0)
        if STEP:
            line = (problem * S + key)[:, None]
            tl.store(k_out + line * D + channel[None, :], k_rows, mask=k_inside)
            tl.store(v_out + line * E + column[None, :], v_rows, mask=v_inside)
        score = tl.dot(rows, tl.trans(k_rows.to(DOT)), input_precision=PRECISION) * scale
        if CAPPED:
            score = soft_cap(score, softcap) * softcap
        visible = (key < S)[None, :] & (row < COUNT)[:, None]
        if CAUSAL:
            distance = at[:, None] + (S - T) - key[None, :]
            visible = visible & (distance >= 0) & (distance < WINDOW)
        if PADDED:
            real = tl.load(padding + batch * p_b + key.to(tl.int64) * p_t, mask=key < S, other=0)
            visible = visible & (real != 0)[None, :]
        score = tl.where(visible, score * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        kept = tl.exp2(top - shift)
        total = total * kept + tl.sum(weight, 1)
        sums = tl.dot(weight.to(DOT), v_rows.to(DOT), acc=sums * kept[:, None], input_precision=PRECISION)
        top = higher
    inside = (row < COUNT)[:, None] & (column < E)[None, :]
    first = problem * COUNT
    if SHARES == 1:
        sums /= tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (first + row)[:, None] * E + column[None, :], sums.to(out.dtype.element_ty), mask=inside)
    else:
        lines = tl.num_programs(0).to(tl.int64) * SHARES * COUNT
        tops = parts + lines * E
        line = (problem * SHARES + share) * COUNT + row
        tl.store(parts + line[:, None] * E + column[None, :], sums, mask=inside)
        tl.store(tops + line, top, mask=row < COUNT)
        tl.store(tops + lines + line, total, mask=row < COUNT)
        # All threads' numbers are written before one thread says so to the other programs.
        tl.debug_barrier()
        if tl.atomic_add(counters + problem, 1, sem="acq_rel", scope="gpu") == SHARES - 1:
            combine(out + first * E, parts, tops, tops + lines, problem, SHARES, COUNT, E, BE, RB, SB)
            tl.store(counters + problem, 0)


@dataclass(frozen=True)
class Shares:
    """How the keys are shared out: blocks of ``block`` keys from number ``first`` on, ``per`` to each of ``count``."""

    block: int
    first: int
    per: int
    count: int


def shares(q: Tensor, k: Tensor, v: Tensor, past: int | None, kind: str, window: int, per: int | None = None) -> Shares:
    """By rule: two programs for every multiprocessor, with ``LEAST`` keys or more each.

    Args:
        past: keys of a cache, all of which the step form copies; None without one.
        per: blocks of a program, instead of the rule's.
    """
    width = triton.next_power_of_2(max(q.shape[3], v.shape[3])) * q.element_size()
    block = min(64, max(16, TILE // width))
    keys = k.shape[2] + (past or 0)
    first = max(0, keys - q.shape[2] - window + 1) // block if kind == "sliding" and past is None else 0
    blocks = triton.cdiv(keys, block) - first
    wanted = max(1, 2 * processors(q.device) // max(1, q.shape[0] * k.shape[1]))
    per = per or max(triton.cdiv(LEAST, block), triton.cdiv(blocks, wanted))
    return Shares(block, first, per, max(1, triton.cdiv(blocks, per)))


def compared(q: Tensor, k: Tensor, v: Tensor, past: int | None, kind: str, window: int) -> int:
    """Blocks of a program when a call is compared on its beginning: as in the whole call, one program for all keys or
    several, and one turn of the loop or several.
    """
    split = shares(q, k, v, past, kind, window)
    return LONGEST if split.count == 1 else min(split.per, 4)


_SHARED: dict[tuple[torch.device, int], Tensor] = {}
_STORES: dict[torch.device, list[Tensor]] = {}
_TAKING = threading.Lock()


def counters(count: int, device: torch.device) -> Tensor:
    """``count`` int32 zeros, which a launch leaves as zeros.

    Launches on one stream come one after the other and share them. A recorded launch may be replayed beside any stream,
    so each has its own, from a store that was made before the recording: a graph never runs beside itself. Where there
    is no such store the zeros are part of the recording.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    stores = _STORES.setdefault(device, [])
    count = (count + 3) // 4 * 4  # 16 bytes: elsewhere aligned memory would be another kernel to compile
    if torch.cuda.is_current_stream_capturing():
        if not stores or stores[-1].shape[0] < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        with _TAKING:
            taken, stores[-1] = stores[-1][:count], stores[-1][count:]
        return taken
    if not stores or stores[-1].shape[0] < COUNTERS // 2:  # those before are kept: graphs count in them
        stores.append(torch.zeros(COUNTERS, dtype=torch.int32, device=device))
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _SHARED or _SHARED[key].shape[0] < count:
        _SHARED[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _SHARED[key]


def supports(q: Tensor, k: Tensor, v: Tensor, past: int | None = None) -> bool:
    """Whether this kernel serves a call: queries times heads of a KV head at most 32; q, k and v all bfloat16, float16
    or float32; heads of at most 256 channels; at least one key and at most 2^30, those of a cache included; enough
    shared memory. Any kind, alignment, padding and soft cap. Others go on as they do without it.
    """
    return (
        q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.dtype == k.dtype == v.dtype
        and min(*q.shape, *k.shape, *v.shape) > 0
        and q.shape[1] // k.shape[1] * q.shape[2] <= ROWS
        and max(q.shape[3], v.shape[3]) <= WIDEST
        and k.shape[2] + (past or 0) <= LONGEST
        and shared_memory(q.device) >= SHARED_MEMORY
    )


def slower(q: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention serves a call sooner that needs no mask and has no cache to be copied.

    On one H200 a token of SmolLM2's shape (heads of 64 channels) gained by this kernel, one of Llama-3-8B's (128) took
    about 6 µs a layer more (``int6_end_to_end_h200.json``). Float32 isn't FlashAttention's.
    """
    return q.dtype != torch.float32 and max(q.shape[3], v.shape[3]) > 64


def _launch(
    q: Tensor, k: Tensor, v: Tensor, caches: tuple[Tensor, Tensor] | None, key_padding: Tensor | None, kind: str,
    window: int, scale: float, softcap: float, per: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    (batch, heads, length, dim), (kv_heads, own, value_dim) = q.shape, v.shape[1:]
    past = None if caches is None else caches[0].shape[2]
    keys, count = own + (past or 0), heads // kv_heads * length
    split = shares(q, k, v, past, kind, window, per)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    old = (k, v) if caches is None else (adjacent(caches[0]), adjacent(caches[1]))
    out = v.new_empty(batch, heads, length, value_dim)
    k_out = None if caches is None else k.new_empty(batch, kv_heads, keys, dim)
    v_out = None if caches is None else v.new_empty(batch, kv_heads, keys, value_dim)
    problems = batch * kv_heads
    parts = torch.empty(
        problems * split.count * count * (value_dim + 2) if split.count > 1 else 1, dtype=torch.float32, device=q.device
    )
    narrow = q.dtype != torch.float32 and not INTERPRETED
    dots = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    wide, some = max(16, triton.next_power_of_2(value_dim)), triton.next_power_of_2(count)
    options: dict[str, Any] = {
        "STEP": caches is not None, "CAUSAL": kind != "full", "PADDED": key_padding is not None,
        "CAPPED": softcap != 0, "BM": max(16, some), "BN": split.block,
        "BD": max(16, triton.next_power_of_2(dim)), "BE": wide, "RB": some,
        "SB": max(1, min(32, COMBINED // (some * wide))), "DOT": dots[q.dtype] if narrow else tl.float32,
        "PRECISION": "ieee" if narrow else "tf32x3", "STAGES": 3, "num_warps": 4 if wide <= 128 else 8,
    }  # fmt: skip
    mask: Tensor | None = None
    mask_strides: tuple[int, ...] = (0, 0)
    if key_padding is not None:
        mask, mask_strides = key_padding.view(torch.uint8), key_padding.stride()
    launcher(few_queries, (problems, split.count))(
        q, k, v, *old, mask, out, k_out, v_out, parts, counters(problems, q.device), *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *old[0].stride()[:3], *old[1].stride()[:3], *mask_strides, kv_heads, length, keys, past or 0,
        heads // kv_heads, window if kind == "sliding" else FOREVER, split.first, split.per, scale, softcap, dim,
        value_dim, **options, **chained(q.device),
    )  # fmt: skip
    return out, k_out, v_out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
    per: int | None = None,
) -> Tensor:
    """See ``reference.forward``; for calls that ``supports`` accepts. ``per``: see :func:`shares`."""
    return _launch(q, k, v, None, key_padding, kind, window, scale, softcap, per)[0]


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
    per: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.step``; for calls that ``supports`` accepts. ``per``: see :func:`shares`."""
    out, keys, values = _launch(q, k, v, (k_cache, v_cache), key_padding, kind, window, scale, softcap, per)
    assert keys is not None and values is not None
    return out, keys, values
