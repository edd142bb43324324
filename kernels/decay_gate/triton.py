# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The decay gate on a GPU: the projection from the gate's rank and the activation in one pass each way.

The logits, as large as the log-decays, never reach memory: a program keeps one head's rows of the projection on the
chip and walks over tiles of tokens. The backward recomputes them; the projection's gradient is summed per program and
z's per head, both added up afterwards in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launcher
from ..triton_device import COUNTS, INTERPRETED, LOG2E, mask_bytes, processors, shared_memory

ROWS = 64
WIDEST = 256
SHARED_MEMORY = 160 * 1024


@triton.jit
def load_projection(weight, bias, channel, cols, width, R, BR: tl.constexpr, DOT: tl.constexpr):
    """Rows ``channel + cols`` of weight and bias, as ``[BR, BF]`` and ``[BF]``."""
    ranks = tl.arange(0, BR)
    pointers = weight + (channel + cols)[None, :] * R + ranks[:, None]
    w = tl.load(pointers, mask=(ranks < R)[:, None] & (cols < width)[None, :], other=0.0).to(DOT)
    return w, tl.load(bias + channel + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def log1p(s):
    """log(1 + s) for 0 ≤ s ≤ 1: a polynomial with a relative error of 2e-7, which is cheaper than a logarithm and
    exact where s is small."""
    p = 0.0052326880395412445 * s - 0.029505213722586632
    p = p * s + 0.07822591066360474
    p = p * s - 0.13663242757320404
    p = p * s + 0.19106005132198334
    p = p * s - 0.2484298199415207
    p = p * s + 0.3331909775733948
    p = p * s - 0.4999949336051941
    return s * (p * s + 0.9999999403953552)


@triton.jit
def load_ranks(z, z_t, z_r, first, T, R, BT: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr):
    """Rows ``first …`` of ``z [T, R]``, zero outside."""
    rows, ranks = tl.arange(0, BT), tl.arange(0, BR)
    pointers = z + tl.cast(first, tl.int64) * z_t + rows[:, None] * z_t + ranks[None, :] * z_r
    return tl.load(pointers, mask=(first + rows < T)[:, None] & (ranks < R)[None, :], other=0.0).to(DOT)


@triton.jit(do_not_specialize=COUNTS)
def gate_forward(
    z, weight, bias, mask, out, z_b, z_t, z_r, T, R, F, HEADS, PER_PROGRAM, rate, lowest,
    MASKED: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``max(-softplus(-logits) · rate, lowest)`` of PER_PROGRAM tiles of BF features of one head."""
    problem, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = problem // HEADS, problem % HEADS
    cols, rows = tl.program_id(2) * BF + tl.arange(0, BF), tl.arange(0, BT)
    w, b = load_projection(weight, bias, head * F, cols, F, R, BR, DOT)
    for step in range(PER_PROGRAM):
        first = (part * PER_PROGRAM + step) * BT
        at = first + rows
        zs = load_ranks(z + batch * z_b, z_t, z_r, first, T, R, BT, BR, DOT)
        logits = tl.dot(zs, w, input_precision=PRECISION) + b[None, :]
        value = (tl.minimum(logits, 0.0) - log1p(tl.exp2(tl.abs(logits) * -LOG2E))) * rate
        value = tl.where(value < lowest, lowest, value)  # NaN stays NaN
        if MASKED:
            keep = tl.load(mask + batch * T + at, mask=at < T, other=0)
            value = tl.where((keep != 0)[:, None], value, 0.0)
        pointers = out + (problem * T + first + rows)[:, None] * F + cols[None, :]
        tl.store(pointers, value.to(out.dtype.element_ty), mask=(at < T)[:, None] & (cols < F)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def gate_backward(
    grad, z, weight, bias, mask, d_z, d_weight, d_bias, g_b, g_h, g_t, z_b, z_t, z_r,
    T, R, F, HEADS, PER_PROGRAM, rate, least,
    MASKED: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's (BF of its features') share of ``d_z [HEADS · blocks, B, T, R]`` and this program's of
    ``d_weight [parts, B, HEADS · F, R]`` and ``d_bias [parts, B, HEADS · F]``. Logits below ``least`` are at the floor.
    """
    problem, part, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, head = problem // HEADS, problem % HEADS
    batches = tl.num_programs(0) // HEADS
    cols, rows, ranks = block * BF + tl.arange(0, BF), tl.arange(0, BT), tl.arange(0, BR)
    channel = head * F
    w, b = load_projection(weight, bias, channel, cols, F, R, BR, DOT)
    total = tl.zeros([BR, BF], tl.float32)
    total_bias = tl.zeros([BF], tl.float32)
    own = ((head * tl.num_programs(2) + block) * batches + batch) * T
    for step in range(PER_PROGRAM):
        first = (part * PER_PROGRAM + step) * BT
        at = first + rows
        zs = load_ranks(z + batch * z_b, z_t, z_r, first, T, R, BT, BR, DOT)
        logits = tl.dot(zs, w, input_precision=PRECISION) + b[None, :]
        wanted = at < T
        if MASKED:
            wanted = wanted & (tl.load(mask + batch * T + at, mask=at < T, other=0) != 0)
        above = grad + batch * g_b + head * g_h + tl.cast(first, tl.int64) * g_t
        above = above + rows[:, None] * g_t + cols[None, :]
        slopes = tl.load(above, mask=wanted[:, None] & (cols < F)[None, :], other=0.0).to(tl.float32)
        slopes = tl.where(logits < least, 0.0, slopes * (rate / (1.0 + tl.exp2(logits * LOG2E))))
        total_bias += tl.sum(slopes, 0)
        narrow = slopes.to(DOT)
        total = tl.dot(tl.trans(zs), narrow, acc=total, input_precision=PRECISION)
        share = tl.dot(narrow, tl.trans(w), input_precision=PRECISION)
        below = d_z + (own + first + rows)[:, None] * R + ranks[None, :]
        tl.store(below, share, mask=(at < T)[:, None] & (ranks < R)[None, :])
    slot = (part * batches + batch) * HEADS * F + channel + cols
    inside = (ranks < R)[:, None] & (cols < F)[None, :]
    tl.store(d_weight + slot[None, :] * R + ranks[:, None], total, mask=inside)
    tl.store(d_bias + slot, total_bias, mask=cols < F)


def supports(z: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether these kernels serve a call: bfloat16 or float32 z, rank at most 64, at least one token, enough shared
    memory. The reference serves the others, on the same device.
    """
    return (
        z.dtype in (torch.bfloat16, torch.float32)
        and all(t.dtype in (torch.bfloat16, torch.float16, torch.float32) for t in (weight, bias))
        and min(z.shape) > 0
        and z.shape[2] <= 64
        and shared_memory(z.device) >= SHARED_MEMORY
    )


def _options(z: Tensor, features: int, widest: int) -> dict[str, Any]:
    narrow = z.dtype == torch.bfloat16 and not INTERPRETED
    least = 16 if INTERPRETED else 64
    return {
        "BT": min(ROWS, max(16, triton.next_power_of_2(z.shape[1]))),
        "BF": min(widest, max(least, triton.next_power_of_2(features))),
        "BR": max(least, triton.next_power_of_2(z.shape[2])),
        "DOT": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "ieee" if narrow else "tf32x3",
    }


def _grid(z: Tensor, kv_heads: int, features: int, options: dict[str, Any], programs: int) -> tuple[Any, int]:
    """The grid of about ``programs`` programs a processor, and the tiles of each."""
    tiles, blocks = triton.cdiv(z.shape[1], options["BT"]), triton.cdiv(features, options["BF"])
    problems = z.shape[0] * kv_heads
    parts = max(1, min(tiles, triton.cdiv(programs * processors(z.device), problems * blocks)))
    each = triton.cdiv(tiles, parts)
    return (problems, triton.cdiv(tiles, each), blocks), each


def floor_of(lowest: float | None) -> float:
    """The floor as the kernels take it."""
    return -math.inf if lowest is None else lowest


def _least(lowest: float | None, temperature: float) -> float:
    """The logit at which the floor is reached: the inverse of ``logsigmoid(x) / temperature``."""
    if lowest is None:
        return -math.inf
    value = lowest * temperature
    return value - math.log(-math.expm1(value))


def forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> Tensor:
    """See ``reference.forward``."""
    features = weight.shape[0] // kv_heads
    options = _options(z, features, 128 if z.dtype == torch.bfloat16 else 64)
    out = z.new_empty(z.shape[0], kv_heads, z.shape[1], features)
    grid, each = _grid(z, kv_heads, features, options, 16)
    launcher(gate_forward, grid)(
        z, weight.to(z.dtype).contiguous(), bias.contiguous(), mask_bytes(mask), out, *z.stride(), z.shape[1],
        z.shape[2], features, kv_heads, each, 1.0 / temperature, floor_of(lowest),
        MASKED=mask is not None, num_warps=4, **options,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.backward``."""
    batch, length, rank = z.shape
    features = weight.shape[0] // kv_heads
    options = _options(z, features, WIDEST if z.dtype == torch.bfloat16 else 64)
    grad = grad if grad.stride(-1) == 1 or features == 1 else grad.contiguous()
    # Pipelined, 256 features of several tiles would need more shared memory than a block has (248 KiB).
    tuning = {"num_warps": 8, "num_stages": 2 if options["BF"] <= 128 else 1}
    grid, each = _grid(z, kv_heads, features, options, 8)
    d_z = z.new_empty((kv_heads * grid[2], batch, length, rank), dtype=torch.float32)
    d_weight = z.new_empty((grid[1], batch, *weight.shape), dtype=torch.float32)
    d_bias = z.new_empty((grid[1], batch, *bias.shape), dtype=torch.float32)
    launcher(gate_backward, grid)(
        grad, z, weight.to(z.dtype).contiguous(), bias.contiguous(), mask_bytes(mask), d_z, d_weight, d_bias,
        *grad.stride()[:3], *z.stride(), length, rank, features, kv_heads, each, 1.0 / temperature,
        _least(lowest, temperature), MASKED=mask is not None, **tuning, **options,
    )  # fmt: skip
    return d_z.sum(0).to(z.dtype), d_weight.sum((0, 1)).to(weight.dtype), d_bias.sum((0, 1)).to(bias.dtype)
