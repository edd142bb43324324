# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Causal depthwise convolution on a GPU: the same functions as ``reference.py``, one pass over memory each way.

A tile of ``BT`` tokens and ``BC`` channels reads its taps as shifted rows (the shifts hit the cache), sums in float32
and rounds once. The gradient of the weights is summed per segment of the sequence, in a fixed order, and the segments
by one more sum: no atomics, so two runs agree to the bit. Within a segment each thread sums for itself: adding up the
rows of every tile would take longer than reading them. Weights are read as ``[W, channels]``, whole vectors at once.

The kernels see channels as ``heads`` of ``width`` channels with strides of their own, so that the feature kernels
(``hedgehog_features``) can use them on ``[B, H, T, D]`` views of ``[B, T, H · D]`` memory without a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launcher
from ..triton_device import COUNTS, processors

MAX_TAPS = 8
ROWS = 64


@triton.jit
def padded_rows(
    x, initial, mask, x_t, x_d, first, shift, cols, width, T, W: tl.constexpr,
    HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Rows ``first + shift …`` of the input: zero at padded tokens and past the end, the carried state before it."""
    rows = tl.arange(0, BT) + shift
    at = first + rows
    inside = (at >= 0) & (at < T)
    pointers = x + tl.cast(first, tl.int64) * x_t + rows[:, None] * x_t + cols[None, :] * x_d
    tile = tl.load(pointers, mask=inside[:, None] & (cols < width)[None, :], other=0.0)
    if MASKED:
        keep = tl.load(mask + at, mask=inside, other=0)
        tile = tl.where((keep != 0)[:, None], tile, 0.0).to(tile.dtype)
    if HAS_INITIAL:
        before = ((at < 0) & (at >= 1 - W))[:, None] & (cols < width)[None, :]
        state = tl.load(initial + cols[None, :] * (W - 1) + (at + W - 1)[:, None], mask=before, other=0.0)
        tile = tl.where(before, state.to(tile.dtype), tile)
    return tile


@triton.jit
def convolved(
    x, initial, mask, weight, w_t, x_t, x_d, first, cols, width, T, W: tl.constexpr,
    HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The convolution's output for rows ``first …`` as a float32 tile ``[BT, BC]``; taps are ``w_t`` elements apart."""
    total = tl.zeros([BT, BC], tl.float32)
    for tap in tl.static_range(W):
        taps = tl.load(weight + tap * w_t + cols, mask=cols < width, other=0.0).to(tl.float32)
        tile = padded_rows(x, initial, mask, x_t, x_d, first, tap - (W - 1), cols, width, T, W, HAS_INITIAL, MASKED, BT)
        total += tile.to(tl.float32) * taps[None, :]
    return total


@triton.jit
def store_final(
    x, initial, mask, final, x_t, x_d, cols, width, T, W: tl.constexpr,
    HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The last ``W - 1`` inputs, oldest first, as ``[channels, W - 1]``."""
    rows = tl.arange(0, BW)
    tile = padded_rows(x, initial, mask, x_t, x_d, T - (W - 1), 0, cols, width, T, W, HAS_INITIAL, MASKED, BW)
    inside = (rows < W - 1)[:, None] & (cols < width)[None, :]
    tl.store(final + cols[None, :] * (W - 1) + rows[:, None], tile.to(final.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def conv_forward(
    x, weight, initial, y, final, x_b, x_t, x_d, T, width, W: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One tile of ``y [B, T, C]``; the last tile of a sequence also writes the final state."""
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tile * BT
    base, start = x + batch * x_b, initial
    if HAS_INITIAL:
        start = initial + batch * width * (W - 1)
    out = convolved(base, start, None, weight, width, x_t, x_d, first, cols, width, T, W, HAS_INITIAL, False, BT, BC)
    rows = first + tl.arange(0, BT)
    pointers = y + (batch * T + rows[:, None]) * width + cols[None, :]
    tl.store(pointers, out.to(y.dtype.element_ty), mask=(rows < T)[:, None] & (cols < width)[None, :])
    if W > 1 and tile == tl.num_programs(0) - 1:
        end = final + batch * width * (W - 1)
        store_final(base, start, None, end, x_t, x_d, cols, width, T, W, HAS_INITIAL, False, BW)


@triton.jit
def chosen(tap: tl.constexpr, own: tl.constexpr, total, product):
    """``total`` with ``product`` added if it is this tap's."""
    if tap == own:
        return total + product
    else:
        return total


@triton.jit
def store_sums(target, tap: tl.constexpr, tile, row, channels, cols, width, W: tl.constexpr):
    """One tap's gradient, if there is such a tap."""
    if tap < W:
        tl.store(target + tap * channels, tl.sum(tile, 0) + row, mask=cols < width)


@triton.jit(do_not_specialize=COUNTS)
def conv_backward(
    grad, grad_state, x, weight, initial, mask, d_x, d_initial, partial,
    g_b, g_h, g_t, g_d, x_b, x_h, x_t, x_d, d_b, d_h, d_t, d_d, T, width, HEADS, PER_SEGMENT,
    W: tl.constexpr, HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment of one block of channels of one head: inputs, carried state, and the segment's sums
    for the weights, ``partial [segments, B, W, HEADS · width]``.
    """
    segment, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(width, BC)
    head, cols = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BC + tl.arange(0, BC)
    channels = HEADS * width
    slopes, xs_base = grad + batch * g_b + head * g_h, x + batch * x_b + head * x_h
    out = d_x + batch * d_b + head * d_h
    taps_base = weight + head * width
    own = (batch * channels + head * width) * (W - 1)
    keep_base, start = mask, initial
    if MASKED:
        keep_base = mask + batch * T
    if HAS_INITIAL:
        start = initial + own
    rows = tl.arange(0, BT)
    # One tile of sums for each tap; those beyond W are never touched.
    s0 = tl.zeros([BT, BC], tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    e0 = tl.zeros([BC], tl.float32)
    e1, e2, e3, e4, e5, e6, e7 = e0, e0, e0, e0, e0, e0, e0
    for step in range(PER_SEGMENT):
        first = (segment * PER_SEGMENT + step) * BT
        at = first + rows
        xs = padded_rows(xs_base, start, keep_base, x_t, x_d, first, 0, cols, width, T, W, False, MASKED, BT)
        total = tl.zeros([BT, BC], tl.float32)
        for ahead in tl.static_range(W):
            tile = padded_rows(slopes, None, None, g_t, g_d, first, ahead, cols, width, T, W, False, False, BT)
            tile = tile.to(tl.float32)
            taps = tl.load(taps_base + (W - 1 - ahead) * channels + cols, mask=cols < width, other=0.0).to(tl.float32)
            total += tile * taps[None, :]
            tile = xs.to(tl.float32) * tile
            s0, s1 = chosen(W - 1 - ahead, 0, s0, tile), chosen(W - 1 - ahead, 1, s1, tile)
            s2, s3 = chosen(W - 1 - ahead, 2, s2, tile), chosen(W - 1 - ahead, 3, s3, tile)
            s4, s5 = chosen(W - 1 - ahead, 4, s4, tile), chosen(W - 1 - ahead, 5, s5, tile)
            s6, s7 = chosen(W - 1 - ahead, 6, s6, tile), chosen(W - 1 - ahead, 7, s7, tile)
        if W > 1:  # noqa: SIM102  (decided when compiled, the other at run time)
            if first + BT > T - (W - 1):
                slot = at - (T - (W - 1))
                held = ((slot >= 0) & (at < T))[:, None] & (cols < width)[None, :]
                pointers = grad_state + own + cols[None, :] * (W - 1) + slot[:, None]
                total += tl.load(pointers, mask=held, other=0.0).to(tl.float32)
        if MASKED:
            keep = tl.load(keep_base + at, mask=at < T, other=0)
            total = tl.where((keep != 0)[:, None], total, 0.0)
        pointers = out + tl.cast(first, tl.int64) * d_t + rows[:, None] * d_t + cols[None, :] * d_d
        tl.store(pointers, total.to(d_x.dtype.element_ty), mask=(at < T)[:, None] & (cols < width)[None, :])
    if HAS_INITIAL:  # noqa: SIM102  (decided when compiled, the other at run time)
        if segment == 0:
            early = tl.arange(0, BW)
            when = early - (W - 1)
            xs = padded_rows(xs_base, start, keep_base, x_t, x_d, 1 - W, 0, cols, width, T, W, True, MASKED, BW)
            xs = tl.where((when < 0)[:, None], xs.to(tl.float32), 0.0)
            total = tl.zeros([BW, BC], tl.float32)
            for ahead in tl.static_range(W):
                tile = padded_rows(slopes, None, None, g_t, g_d, 1 - W, ahead, cols, width, T, W, False, False, BW)
                tile = tile.to(tl.float32)
                at_tap = taps_base + (W - 1 - ahead) * channels + cols
                total += tile * tl.load(at_tap, mask=cols < width, other=0.0).to(tl.float32)[None, :]
                row = tl.sum(xs * tile, 0)
                e0, e1 = chosen(W - 1 - ahead, 0, e0, row), chosen(W - 1 - ahead, 1, e1, row)
                e2, e3 = chosen(W - 1 - ahead, 2, e2, row), chosen(W - 1 - ahead, 3, e3, row)
                e4, e5 = chosen(W - 1 - ahead, 4, e4, row), chosen(W - 1 - ahead, 5, e5, row)
                e6, e7 = chosen(W - 1 - ahead, 6, e6, row), chosen(W - 1 - ahead, 7, e7, row)
            slot = when - (T - (W - 1))
            held = ((slot >= 0) & (when < 0))[:, None] & (cols < width)[None, :]
            pointers = grad_state + own + cols[None, :] * (W - 1) + slot[:, None]
            total += tl.load(pointers, mask=held, other=0.0).to(tl.float32)
            pointers = d_initial + own + cols[None, :] * (W - 1) + early[:, None]
            inside = (early < W - 1)[:, None] & (cols < width)[None, :]
            tl.store(pointers, total.to(d_initial.dtype.element_ty), mask=inside)
    target = partial + (segment * tl.num_programs(2) + batch) * W * channels + head * width + cols
    store_sums(target, 0, s0, e0, channels, cols, width, W)
    store_sums(target, 1, s1, e1, channels, cols, width, W)
    store_sums(target, 2, s2, e2, channels, cols, width, W)
    store_sums(target, 3, s3, e3, channels, cols, width, W)
    store_sums(target, 4, s4, e4, channels, cols, width, W)
    store_sums(target, 5, s5, e5, channels, cols, width, W)
    store_sums(target, 6, s6, e6, channels, cols, width, W)
    store_sums(target, 7, s7, e7, channels, cols, width, W)


def supports(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> bool:
    """Whether these kernels serve a call: 1 to 8 taps, at least one token, float32 or narrower. The reference serves
    the others, on the same device."""
    given = [t for t in (x, weight, initial_state) if t is not None]
    return weight.shape[1] <= MAX_TAPS and min(x.shape) > 0 and all(t.element_size() <= 4 for t in given)


def _tile(length: int, width: int, most: int = ROWS) -> tuple[int, int]:
    """Tokens (at most ``most``) and channels of a tile."""
    return min(most, max(16, triton.next_power_of_2(length))), min(64, max(16, triton.next_power_of_2(width)))


def forward(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``reference.forward``; x may have any strides."""
    assert supports(x, weight, initial_state)
    batch, length, channels = x.shape
    taps = weight.shape[1]
    y, final = x.new_empty(x.shape), x.new_empty(batch, channels, taps - 1)
    initial = None if initial_state is None or taps == 1 else initial_state.contiguous()
    rows, block = _tile(length, channels)
    launcher(conv_forward, (triton.cdiv(length, rows), triton.cdiv(channels, block), batch))(
        x, weight.t().contiguous(), initial, y, final, *x.stride(), length, channels,
        W=taps, HAS_INITIAL=initial is not None, BT=rows, BC=block, BW=triton.next_power_of_2(taps), num_warps=4,
    )  # fmt: skip
    return y, final


def backward(
    grad_y: Tensor, grad_state: Tensor, x: Tensor, weight: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for x, weight and initial_state (None where absent)."""
    assert supports(x, weight, initial_state)
    d_x = x.new_empty(x.shape)
    grads = [t.unsqueeze(1) for t in (grad_y, x, d_x)]
    d_weight, d_initial = head_gradients(grads[0], grad_state, grads[1], weight, initial_state, None, grads[2])
    return d_x, d_weight, d_initial


def head_gradients(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    d_x: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The convolution's gradients with channels seen as heads: ``grad, x, d_x [B, heads, T, width]``, any strides.

    Writes ``d_x``; returns the gradients of the weight ``[heads · width, W]`` and the carried state. ``mask [B, T]``
    (uint8, contiguous) zeroes padded inputs.
    """
    batch, heads, length, width = x.shape
    taps = weight.shape[1]
    initial = None if initial_state is None or taps == 1 else initial_state.contiguous()
    d_initial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    rows, block = _tile(length, width, ROWS // 2)
    columns, tiles = heads * triton.cdiv(width, block), triton.cdiv(length, rows)
    # About 16 small programs a processor; the weights' gradient is summed over one partial result of each.
    segments = max(1, min(tiles, triton.cdiv(16 * processors(x.device), columns * batch)))
    per_segment = triton.cdiv(tiles, segments)
    segments = triton.cdiv(tiles, per_segment)
    partial = x.new_empty((segments, batch, taps, heads * width), dtype=torch.float32)
    launcher(conv_backward, (segments, columns, batch))(
        grad, grad_state.contiguous(), x, weight.t().contiguous(), initial, mask, d_x, d_initial, partial,
        *grad.stride(), *x.stride(), *d_x.stride(), length, width, heads, per_segment,
        W=taps, HAS_INITIAL=initial is not None, MASKED=mask is not None,
        BT=rows, BC=block, BW=triton.next_power_of_2(taps), num_warps=4,
    )  # fmt: skip
    return partial.sum((0, 1)).t().to(weight.dtype), d_initial
