# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What a LAWCAT recurrence reads of one token, in one kernel: decoding is bound by the number of kernels.

A program is a query head, a KV head's keys or a block of a KV head's gate; the gate's programs each make the norm and
the low-rank projection of the hidden states anew, which costs less than a launch. Everything is read once and summed in
float32; what the separate ops round between them is rounded here, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..compile_ahead import launcher
from ..decay_gate.triton import floor_of, log1p
from ..short_conv.triton import MAX_TAPS
from ..triton_device import LOG2E, chained, mask_bytes
from .reference import Inputs

WIDEST = 128  # channels of a head
RANKS = 64
_CHANNELS = 1024  # of the hidden states at a time
_FEATURES = 128  # of a head's gate in one program
_WARPS = 8


@triton.jit
def _features(
    x, x_b, x_h, x_d, conv, state, weight, bias, mask, out, end, batch, head, H, GROUPS,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, ZEROED: tl.constexpr, MASKED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One head: the convolution of one token, the map, both softmaxes, and the convolution's next state."""
    cols = tl.arange(0, BD)
    inside = cols < D
    channel = head * D + cols
    square = inside[:, None] & inside[None, :]
    place = head // GROUPS * D
    tile = tl.load(weight + (place + cols)[:, None] * D + cols[None, :], mask=square, other=0.0).to(tl.float32)
    added = tl.load(bias + place + cols, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    keep = 1
    if MASKED:
        keep = tl.load(mask + batch).to(tl.int32)
    now = tl.load(x + batch * x_b + head * x_h + cols * x_d, mask=inside, other=0.0).to(tl.float32)
    now = tl.where(keep != 0, now, 0.0)
    base = (batch * H * D + channel) * (W - 1)
    mixed = now * tl.load(conv + channel * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(W - 1):
        before = tl.load(state + base + tap, mask=inside, other=0.0)
        mixed += before.to(tl.float32) * tl.load(conv + channel * W + tap, mask=inside, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(end + base + tap - 1, before.to(end.dtype.element_ty), mask=inside)
    if W > 1:
        tl.store(end + base + W - 2, now.to(end.dtype.element_ty), mask=inside)
    mixed = mixed.to(x.dtype.element_ty).to(tl.float32)
    y = (tl.sum(mixed[:, None] * tile, 0) + added) * LOG2E
    high = tl.exp2(tl.where(inside, y - tl.max(tl.where(inside, y, float("-inf")), 0), float("-inf")))
    low = tl.exp2(tl.where(inside, tl.min(tl.where(inside, y, float("inf")), 0) - y, float("-inf")))
    high, low = high / tl.sum(high, 0), low / tl.sum(low, 0)
    if ZEROED:
        high, low = tl.where(keep != 0, high, 0.0), tl.where(keep != 0, low, 0.0)
    target = out + (batch * H + head) * 2 * D + cols
    tl.store(target, high.to(out.dtype.element_ty), mask=inside)
    tl.store(target + D, low.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _projection(down, norm, start, C, R, NORM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):
    """BC columns of the low-rank projection, and of the norm's weight."""
    ranks, at = tl.arange(0, BR), start + tl.arange(0, BC)
    within = (ranks < R)[:, None] & (at < C)[None, :]
    weights = tl.load(down + ranks[:, None] * C + at[None, :], mask=within, other=0.0)
    scales = weights
    if NORM:
        scales = tl.load(norm + at, mask=at < C, other=0.0)
    return weights, scales


@triton.jit
def _log_decay(
    x, norm, down, up, bias, mask, out, batch, kv_head, block, HKV, C, R, F, epsilon, rate, lowest,
    NORM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, ONCE: tl.constexpr,
    MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BF features of one KV head's gate. ONCE: the hidden states are at most BC channels."""
    ranks, row = tl.arange(0, BR), x + batch * C
    cols = block * BF + tl.arange(0, BF)
    inside = cols < F
    rows = kv_head * F + cols
    within = inside[:, None] & (ranks < R)[None, :]
    raised = tl.load(up + rows[:, None] * R + ranks[None, :], mask=within, other=0.0).to(tl.float32)
    added = tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if ONCE:
        weights, scales = _projection(down, norm, 0, C, R, NORM, BC, BR)
    if PDL:
        gdc_wait()
    keep = 1
    if MASKED:
        keep = tl.load(mask + batch).to(tl.int32)
    root, z = 1.0, tl.zeros([BR], tl.float32)
    if ONCE:
        at = tl.arange(0, BC)
        part = tl.load(row + at, mask=at < C, other=0.0).to(tl.float32)
        if NORM:
            root = 1.0 / tl.sqrt_rn(tl.sum(part * part, 0) / C + epsilon)
            part = (part * root * scales.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
        z = tl.sum(weights.to(tl.float32) * part[None, :], 1)
    else:
        if NORM:
            squares = tl.zeros([BC], tl.float32)
            for start in tl.range(0, C, BC):
                at = start + tl.arange(0, BC)
                part = tl.load(row + at, mask=at < C, other=0.0).to(tl.float32)
                squares += part * part
            root = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / C + epsilon)
        for start in tl.range(0, C, BC):
            at = start + tl.arange(0, BC)
            part = tl.load(row + at, mask=at < C, other=0.0).to(tl.float32)
            weights, scales = _projection(down, norm, start, C, R, NORM, BC, BR)
            if NORM:
                part = (part * root * scales.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
            z += tl.sum(weights.to(tl.float32) * part[None, :], 1)
    z = z.to(x.dtype.element_ty).to(tl.float32)
    logits = tl.sum(raised * z[None, :], 1) + added
    value = (tl.minimum(logits, 0.0) - log1p(tl.exp2(tl.abs(logits) * -LOG2E))) * rate
    value = tl.where(value < lowest, lowest, value)  # NaN stays NaN
    value = tl.where(keep != 0, value, 0.0)
    tl.store(out + (batch * HKV + kv_head) * F + cols, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "HKV"])
def one_token(
    q, conv_q, state_q, map_q, bias_q, k, conv_k, state_k, map_k, bias_k, x, norm, down, up, gate_bias, mask,
    feature_q, feature_k, log_decay, end_q, end_k, q_b, q_h, q_d, k_b, k_h, k_d,
    H, HKV, GROUPS_Q, GROUPS_K, C, R, F, epsilon, rate, lowest,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, BLOCKS: tl.constexpr, ONCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid ``[H + HKV + HKV · BLOCKS, B]``."""
    part, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    if part < H:
        _features(
            q, q_b, q_h, q_d, conv_q, state_q, map_q, bias_q, mask, feature_q, end_q, batch, part, H, GROUPS_Q,
            D, W, BD, False, MASKED, PDL,
        )  # fmt: skip
    elif part < H + HKV:
        _features(
            k, k_b, k_h, k_d, conv_k, state_k, map_k, bias_k, mask, feature_k, end_k, batch, part - H, HKV, GROUPS_K,
            D, W, BD, MASKED, MASKED, PDL,
        )  # fmt: skip
    else:
        gate = part - H - HKV
        _log_decay(
            x, norm, down, up, gate_bias, mask, log_decay, batch, gate // BLOCKS, gate % BLOCKS, HKV, C, R, F,
            epsilon, rate, lowest, NORM, BC, BR, BF, ONCE, MASKED, PDL,
        )  # fmt: skip


def supports(*args: Any) -> bool:
    """Whether the kernel serves a call: one token, no float64, q's heads as wide and as many taps as k's, heads of at
    most 128 channels, at most 8 taps, a gate of rank 64 at most.
    """
    given = Inputs(*args)
    q, taps = given.q, given.conv_q.shape[1]
    dtypes = {value.dtype for value in args if isinstance(value, Tensor) and value.dtype != torch.bool}
    return (
        q.shape[2] == 1
        and min(q.shape) > 0
        and dtypes <= {torch.bfloat16, torch.float16, torch.float32}
        and (q.shape[3], taps) == (given.k.shape[3], given.conv_k.shape[1])
        and q.shape[3] <= WIDEST
        and taps <= MAX_TAPS
        and given.down.shape[0] <= RANKS
    )


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.forward``; q and k may have any strides."""
    given = Inputs(*args)
    q, k, x, kv_heads = given.q, given.k, given.x, given.kv_heads
    (batch, heads, _, dim), features = q.shape, given.up.shape[0] // kv_heads
    feature_q, feature_k = (t.new_empty(*t.shape[:3], 2 * dim) for t in (q, k))
    log_decay = x.new_empty(batch, kv_heads, 1, features)
    end_q, end_k = q.new_empty(given.state_q.shape), k.new_empty(given.state_k.shape)
    block = min(_FEATURES, max(16, triton.next_power_of_2(features)))
    blocks, width = triton.cdiv(features, block), max(16, triton.next_power_of_2(dim))
    of_q, of_k = ([tensor.contiguous() for tensor in side] for side in (given[1:5], given[6:10]))
    norm = None if given.norm_weight is None else given.norm_weight.contiguous()
    stored = [given.down, given.up, given.gate_bias]
    gate = [tensor.contiguous() for tensor in stored]
    # What was copied for this call may not be read before the copying has ended.
    pairs = [*zip(given[1:5], of_q, strict=True), *zip(given[6:10], of_k, strict=True), *zip(stored, gate, strict=True)]
    early = norm is given.norm_weight and all(a is b for a, b in pairs)
    launcher(one_token, (heads + kv_heads + kv_heads * blocks, batch))(
        q, *of_q, k, *of_k, x.contiguous(), norm, *gate, mask_bytes(given.mask),
        feature_q, feature_k, log_decay, end_q, end_k, q.stride(0), q.stride(1), q.stride(3),
        k.stride(0), k.stride(1), k.stride(3), heads, kv_heads, heads // given.map_q.shape[0],
        kv_heads // given.map_k.shape[0], x.shape[2], given.down.shape[0], features, given.eps, 1.0 / given.temperature,
        floor_of(given.lowest), D=dim, W=given.conv_q.shape[1], BD=width, MASKED=given.mask is not None,
        NORM=norm is not None, BC=min(_CHANNELS, triton.next_power_of_2(x.shape[2])),
        BR=max(16, triton.next_power_of_2(given.down.shape[0])), BF=block, BLOCKS=blocks,
        ONCE=x.shape[2] <= _CHANNELS, num_warps=_WARPS, **chained(q.device, early),
    )  # fmt: skip
    return feature_q, feature_k, log_decay, end_q, end_k
