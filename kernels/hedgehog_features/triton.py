# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Hedgehog features on a GPU: convolution, map and both softmaxes in one pass, and their gradients in two.

Forward: a program keeps one head's map on the chip and walks over tiles of 64 tokens; nothing but x is read and
nothing but the features is written. Backward: the first pass recomputes the features, sums the map's gradient over
its tiles and writes the gradient of the convolution's output; the second is the convolution's own backward. Weight
gradients are partial sums of a fixed order, no atomics.

bfloat16 inputs multiply on bfloat16 tensor cores with float32 sums; float32 inputs in three TF32 products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launcher
from ..short_conv.triton import MAX_TAPS, convolved, head_gradients, padded_rows, store_final
from ..triton_device import COUNTS, INTERPRETED, LOG2E, mask_bytes, processors, shared_memory

ROWS = 64
SHARED_MEMORY = 160 * 1024


@triton.jit
def mapped_rows(
    x, conv, initial, mask, w_t, x_t, x_d, first, cols, T, D: tl.constexpr, W: tl.constexpr, CONV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What the map multiplies: the convolved rows, rounded as the convolution rounds them, or the rows themselves."""
    if CONV:
        tile = convolved(x, initial, mask, conv, w_t, x_t, x_d, first, cols, D, T, W, HAS_INITIAL, MASKED, BT, BD)
        return tile.to(x.dtype.element_ty).to(DOT)
    else:
        return padded_rows(x, None, None, x_t, x_d, first, 0, cols, D, T, W, False, False, BT).to(DOT)


@triton.jit
def both_softmaxes(y, cols, D: tl.constexpr, BD: tl.constexpr):
    """Softmax of y and of −y over the D real columns."""
    y *= LOG2E
    high, low = y, y
    if D < BD:
        high = tl.where((cols < D)[None, :], y, float("-inf"))
        low = tl.where((cols < D)[None, :], y, float("inf"))
    high = tl.exp2(high - tl.max(high, 1)[:, None])
    low = tl.exp2(tl.min(low, 1)[:, None] - low)
    return high * (1.0 / tl.sum(high, 1))[:, None], low * (1.0 / tl.sum(low, 1))[:, None]


@triton.jit(do_not_specialize=COUNTS)
def features_forward(
    x, conv, initial, weight, bias, mask, out, final, x_b, x_h, x_t, x_d, T, H, GROUPS, PER_PROGRAM, SKIPPED,
    D: tl.constexpr, W: tl.constexpr, CONV: tl.constexpr, HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr,
    MASK_OUTPUT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The features of PER_PROGRAM tiles of one head, after its first SKIPPED."""
    problem, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = problem // H, problem % H
    cols, index = tl.arange(0, BD), tl.arange(0, BT)
    base = x + batch * x_b + head * x_h
    taps, start, keep_base = conv, initial, mask
    if CONV:
        taps = conv + head * D
    if HAS_INITIAL:
        start = initial + problem * D * (W - 1)
    if MASKED:
        keep_base = mask + batch * T
    square = (cols < D)[:, None] & (cols < D)[None, :]
    chosen = head // GROUPS
    w = tl.load(weight + chosen * D * D + cols[:, None] * D + cols[None, :], mask=square, other=0.0).to(DOT)
    b = tl.load(bias + chosen * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    for step in range(PER_PROGRAM):
        first = (SKIPPED + part * PER_PROGRAM + step) * BT
        c = mapped_rows(
            base, taps, start, keep_base, H * D, x_t, x_d, first, cols, T, D, W, CONV, HAS_INITIAL, MASKED, BT, BD, DOT
        )
        y = tl.dot(c, w, input_precision=PRECISION) + b[None, :]
        positive, negative = both_softmaxes(y, cols, D, BD)
        at = first + index
        if MASKED and MASK_OUTPUT:
            keep = (tl.load(keep_base + at, mask=at < T, other=0) != 0)[:, None]
            positive, negative = tl.where(keep, positive, 0.0), tl.where(keep, negative, 0.0)
        pointers = out + (problem * T + first + index)[:, None] * (2 * D) + cols[None, :]
        inside = (at < T)[:, None] & (cols < D)[None, :]
        tl.store(pointers, positive.to(out.dtype.element_ty), mask=inside)
        tl.store(pointers + D, negative.to(out.dtype.element_ty), mask=inside)
    if CONV and W > 1:  # noqa: SIM102  (decided when compiled, the other at run time)
        if (part == tl.num_programs(1) - 1) & ((SKIPPED + tl.num_programs(1) * PER_PROGRAM) * BT >= T):
            end = final + problem * D * (W - 1)
            store_final(base, start, keep_base, end, x_t, x_d, cols, D, T, W, HAS_INITIAL, MASKED, BW)


@triton.jit(do_not_specialize=COUNTS)
def features_backward(
    grad, x, conv, initial, weight, bias, mask, d_mixed, d_weight, d_bias,
    g_b, g_h, g_t, x_b, x_h, x_t, x_d, d_b, d_h, d_t, T, H, GROUPS, PER_PROGRAM,
    D: tl.constexpr, W: tl.constexpr, CONV: tl.constexpr, HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr,
    MASK_OUTPUT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of PER_PROGRAM tiles of one head: of the map's input, and this program's share of the map's and the
    bias's, ``d_weight [parts, B · H, D, D]`` and ``d_bias [parts, B · H, D]``.
    """
    problem, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = problem // H, problem % H
    cols, index = tl.arange(0, BD), tl.arange(0, BT)
    base, slopes = x + batch * x_b + head * x_h, grad + batch * g_b + head * g_h
    taps, start, keep_base = conv, initial, mask
    if CONV:
        taps = conv + head * D
    if HAS_INITIAL:
        start = initial + problem * D * (W - 1)
    if MASKED:
        keep_base = mask + batch * T
    square = (cols < D)[:, None] & (cols < D)[None, :]
    chosen = head // GROUPS
    w = tl.load(weight + chosen * D * D + cols[:, None] * D + cols[None, :], mask=square, other=0.0).to(DOT)
    b = tl.load(bias + chosen * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([BD, BD], tl.float32)
    total_bias = tl.zeros([BD], tl.float32)
    for step in range(PER_PROGRAM):
        first = (part * PER_PROGRAM + step) * BT
        c = mapped_rows(
            base, taps, start, keep_base, H * D, x_t, x_d, first, cols, T, D, W, CONV, HAS_INITIAL, MASKED, BT, BD, DOT
        )
        y = tl.dot(c, w, input_precision=PRECISION) + b[None, :]
        at = first + index
        wanted = at < T
        if MASKED and MASK_OUTPUT:
            wanted = wanted & (tl.load(keep_base + at, mask=at < T, other=0) != 0)
        inside = wanted[:, None] & (cols < D)[None, :]
        pointers = slopes + tl.cast(first, tl.int64) * g_t + index[:, None] * g_t + cols[None, :]
        positive, negative = both_softmaxes(y, cols, D, BD)
        d_positive = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        d_y = positive * (d_positive - tl.sum(positive * d_positive, 1)[:, None])
        d_negative = tl.load(pointers + D, mask=inside, other=0.0).to(tl.float32)
        d_y -= negative * (d_negative - tl.sum(negative * d_negative, 1)[:, None])
        total_bias += tl.sum(d_y, 0)
        narrow = d_y.to(DOT)
        total = tl.dot(tl.trans(c), narrow, acc=total, input_precision=PRECISION)
        d_c = tl.dot(narrow, tl.trans(w), input_precision=PRECISION)
        pointers = d_mixed + batch * d_b + head * d_h + tl.cast(first, tl.int64) * d_t
        pointers = pointers + index[:, None] * d_t + cols[None, :]
        tl.store(pointers, d_c.to(d_mixed.dtype.element_ty), mask=(at < T)[:, None] & (cols < D)[None, :])
    slot = part * tl.num_programs(0) + problem
    tl.store(d_weight + slot * D * D + cols[:, None] * D + cols[None, :], total, mask=square)
    tl.store(d_bias + slot * D + cols, total_bias, mask=cols < D)


def supports(x: Tensor, conv_weight: Tensor | None, initial_state: Tensor | None, weight: Tensor, bias: Tensor) -> bool:
    """Whether these kernels serve a call: bfloat16 or float32 x, heads of at most 128 channels (64 in float32 on a
    GPU), at most 8 taps, at least one token, enough shared memory. The reference serves the others, on the device.
    """
    given = [t for t in (conv_weight, initial_state, weight, bias) if t is not None]
    widest = 64 if x.dtype == torch.float32 and x.is_cuda else 128
    return (
        x.dtype in (torch.bfloat16, torch.float32)
        and all(t.dtype in (torch.bfloat16, torch.float16, torch.float32) for t in given)
        and (conv_weight is None or conv_weight.shape[1] <= MAX_TAPS)
        and min(x.shape) > 0
        and x.shape[3] <= widest
        and shared_memory(x.device) >= SHARED_MEMORY
    )


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _options(
    x: Tensor, conv_weight: Tensor | None, initial_state: Tensor | None, mask: Tensor | None, mask_output: bool
) -> dict[str, Any]:
    length, dim = x.shape[2:]
    taps = 1 if conv_weight is None else conv_weight.shape[1]
    narrow = x.dtype == torch.bfloat16 and not INTERPRETED
    return {
        "D": dim, "W": taps, "CONV": conv_weight is not None, "HAS_INITIAL": initial_state is not None and taps > 1,
        "MASKED": mask is not None, "MASK_OUTPUT": mask_output,
        "BT": min(ROWS, max(16, triton.next_power_of_2(length))),
        "BD": max(16 if INTERPRETED else 64, triton.next_power_of_2(dim)), "BW": triton.next_power_of_2(taps),
        "DOT": tl.bfloat16 if narrow else tl.float32, "PRECISION": "ieee" if narrow else "tf32x3",
    }  # fmt: skip


def _stages(fits: bool, options: dict[str, Any]) -> int:
    """Loads under way: where a state is read too, three tiles of both may be more than a block's shared memory."""
    return 3 if fits or not options["HAS_INITIAL"] else 1


def _parts(x: Tensor, tiles: int, programs: int) -> tuple[int, int]:
    """Into how many programs a head's tiles are cut, and tiles per program: about ``programs`` a processor."""
    heads = x.shape[0] * x.shape[1]
    parts = max(1, min(tiles, triton.cdiv(programs * processors(x.device), heads)))
    each = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, each), each


def forward(
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, Tensor]:
    """See ``reference.forward``; x may have any strides."""
    batch, heads, length, dim = x.shape
    options = _options(x, conv_weight, initial_state, mask, mask_output)
    x = _unit_columns(x)
    features = x.new_empty(batch, heads, length, 2 * dim)
    state = x.new_empty(batch, heads * dim, options["W"] - 1)
    taps = None if conv_weight is None else conv_weight.t().contiguous()
    weight, bias, keep = weight.to(x.dtype).contiguous(), bias.contiguous(), mask_bytes(mask)
    tiles = triton.cdiv(length, options["BT"])

    def launch(parts: int, each: int, skipped: int, initial: Tensor | None) -> None:
        tuning = forward_config(x, options | {"HAS_INITIAL": initial is not None})
        launcher(features_forward, (batch * heads, parts))(
            x, taps, initial, weight, bias, keep, features, state, *x.stride(), length, heads,
            heads // weight.shape[0], each, skipped, **tuning,
        )  # fmt: skip

    # A carried state enters the first tile alone. Its loads would cost every other one as much, masked as they were.
    first = 0
    if options["HAS_INITIAL"]:
        assert initial_state is not None
        launch(1, 1, 0, initial_state.contiguous())
        first = 1
    if tiles > first:
        parts, each = _parts(x, tiles - first, 16)
        launch(parts, each, first, None)
    return features, state


def forward_config(x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The forward kernel's tile and options: of warps and stages, those that were fastest on an H200."""
    stages = _stages(False, options) if x.dtype == torch.float32 else 2
    return {"num_warps": 4, "num_stages": stages, **options}


def backward(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """See ``reference.backward``; gradients of x lie in memory as ``[B, T, H, D]``."""
    batch, heads, length, dim = x.shape
    maps = weight.shape[0]
    options = _options(x, conv_weight, initial_state, mask, mask_output)
    x, grad, keep = _unit_columns(x), _unit_columns(grad), mask_bytes(mask)
    d_mixed = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    parts, each = _parts(x, triton.cdiv(length, options["BT"]), 8)
    d_weight = x.new_empty((parts, batch, maps, heads // maps, dim, dim), dtype=torch.float32)
    d_bias = x.new_empty((parts, batch, maps, heads // maps, dim), dtype=torch.float32)
    launcher(features_backward, (batch * heads, parts))(
        grad, x, None if conv_weight is None else conv_weight.t().contiguous(),
        initial_state.contiguous() if initial_state is not None and options["HAS_INITIAL"] else None,
        weight.to(x.dtype).contiguous(), bias.contiguous(), keep, d_mixed, d_weight, d_bias,
        *grad.stride()[:3], *x.stride(), *d_mixed.stride()[:3], length, heads, heads // maps, each,
        num_warps=8, num_stages=_stages(options["BD"] * x.element_size() <= 128, options), **options,
    )  # fmt: skip
    own = (d_weight.sum((0, 1, 3)).to(weight.dtype), d_bias.sum((0, 1, 3))[:, None].to(bias.dtype))
    if conv_weight is None:
        return d_mixed, None, None, *own
    d_x = torch.empty_like(d_mixed)
    d_conv, d_initial = head_gradients(d_mixed, grad_state, x, conv_weight, initial_state, keep, d_x)
    return d_x, d_conv, d_initial, *own
