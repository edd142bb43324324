# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Linear attention without a causal order on a GPU: one state for all tokens, then every query reads it.

``summed`` adds up ``xᵀ y`` over segments of tokens (a state; with queries and the outputs' gradient, a state's
gradient), ``product`` multiplies rows with a state. Both walk over blocks of 64 columns, so heads of any size are
served. The sums of segments are added in a fixed order: two runs agree to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launcher
from ..triton_device import COUNTS, processors
from .triton_blocks import EPS, INTERPRETED, load_rows, store_rows
from .triton_plan import CHUNK, Options, prepare, strides, unit_columns

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@triton.jit(do_not_specialize=COUNTS)
def summed(
    x, y, weight, out, x_b, x_h, x_t, y_b, y_h, y_t, T, scale, D, DV, HKV, TILES, PER_SEGMENT,
    GROUP: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHTED: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of ``Σ (scale · x)ᵀ y`` over a segment and GROUP heads: ``out [segments, BH, D, DV (+ 1)]``.

    WEIGHTED: ``weight [2, B, H, T]`` holds a factor for the rows of y and what the column of ones is instead.
    """
    blocks = tl.cdiv(DV, BLOCK)
    row, column = tl.program_id(0) // blocks * BLOCK, tl.program_id(0) % blocks * BLOCK
    segment, problem = tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, kv_head = problem // HKV, problem % HKV
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    begin = segment * PER_SEGMENT
    for tile in range(begin, tl.minimum(begin + PER_SEGMENT, TILES)):
        first = tile * BT
        for member in range(GROUP):
            head = kv_head * GROUP + member
            xs = load_rows(x + batch * x_b + head * x_h + row, x_t, first, T, D - row, BT, BLOCK)
            ys = load_rows(y + batch * y_b + head * y_h + column, y_t, first, T, DV - column, BT, BLOCK)
            scaled = xs.to(tl.float32) * scale
            if WEIGHTED:
                rows = first + tl.arange(0, BT)
                at = (problem * GROUP + member) * T + rows
                inverse = tl.load(weight + at, mask=rows < T, other=0.0)
                slope = tl.load(weight + tl.num_programs(2).to(tl.int64) * GROUP * T + at, mask=rows < T, other=0.0)
                sums += tl.sum(scaled * slope[:, None], 0)
                scaled *= inverse[:, None]
            elif NORMALIZE:
                sums += tl.sum(scaled, 0)
            total = tl.dot(tl.trans(scaled.to(xs.dtype)), ys, acc=total, input_precision=PRECISION)
    E = DV + NORMALIZE
    keys, values = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    base = out + (segment * tl.num_programs(2) + problem) * D * E
    tl.store(base + keys[:, None] * E + values[None, :], total, mask=(keys < D)[:, None] & (values < DV)[None, :])
    if NORMALIZE:
        tl.store(base + keys * E + DV, sums, mask=keys < tl.where(column == 0, D, 0))


@triton.jit(do_not_specialize=COUNTS)
def product(
    x, state, weight, out, x_b, x_h, x_t, o_b, o_h, o_t, T, scale, D, DV, HKV,
    GROUP: tl.constexpr, TRANSPOSED: tl.constexpr, NORMALIZE: tl.constexpr, DIVIDE: tl.constexpr,
    WEIGHTED: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``scale · x S`` (TRANSPOSED: ``x Sᵀ``) for a state ``S [D, DV (+ 1)]`` of the head's group.

    The last column of a normalised state is what results are divided by (DIVIDE), or, TRANSPOSED, what is added to
    each row: WEIGHTED, rows are multiplied by ``weight[0]`` and take ``weight[1]`` of that column.
    """
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK
    heads = HKV * GROUP
    batch, kv_head = head // heads, head % heads // GROUP
    E = DV + NORMALIZE
    base = state + (batch * HKV + kv_head) * D * E
    source = x + batch * x_b + head % heads * x_h
    first = tile * BT
    rows, inner, cols = first + tl.arange(0, BT), tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    depth, width = (DV, D) if TRANSPOSED else (D, DV)
    total = tl.zeros([BT, BLOCK], tl.float32)
    ones = tl.zeros([BT], tl.float32)
    for start in range(0, depth, BLOCK):
        xs = load_rows(source + start, x_t, first, T, depth - start, BT, BLOCK)
        at = start + inner
        inside = (at < depth)[:, None] & (cols < width)[None, :]
        if TRANSPOSED:
            pointers = base + at[:, None] + cols[None, :] * E
        else:
            pointers = base + at[:, None] * E + cols[None, :]
        block = tl.load(pointers, mask=inside, other=0.0).to(xs.dtype)
        total = tl.dot(xs, block, acc=total, input_precision=PRECISION)
        if DIVIDE:
            sums = tl.load(base + at * E + DV, mask=at < depth, other=0.0)
            ones += tl.sum(xs.to(tl.float32) * sums[None, :], 1)
    total *= scale
    if DIVIDE:
        total = total / (ones * scale + EPS)[:, None]
    if TRANSPOSED and NORMALIZE:
        sums = tl.load(base + cols * E + DV, mask=cols < width, other=0.0)
        if WEIGHTED:
            at = head * T + rows
            inverse = tl.load(weight + at, mask=rows < T, other=0.0)
            slope = tl.load(weight + tl.num_programs(1).to(tl.int64) * T + at, mask=rows < T, other=0.0)
            total = total * inverse[:, None] + slope[:, None] * (sums * scale)[None, :]
        else:
            total += sums[None, :]
    target = out + batch * o_b + head % heads * o_h + column
    store_rows(target, o_t, first, T, width - column, total, BT, BLOCK)


def _options(x: Tensor, group: int, normalize: bool) -> Options:
    narrow = x.dtype == torch.bfloat16
    return {
        "GROUP": group,
        "NORMALIZE": normalize,
        "BT": CHUNK,
        "BLOCK": 16 if INTERPRETED.value else 64,
        "PRECISION": "ieee" if narrow else "tf32x3",
        "num_warps": 4,
        "num_stages": 2 if narrow else 1,
    }


def _sum(
    x: Tensor, y: Tensor, weight: Tensor | None, start: Tensor | None, kv_heads: int, scale: float, normalize: bool
) -> Tensor:
    """``[B, Hkv, D, Dv (+ 1)]`` float32, on top of ``start``."""
    batch, heads, length, width = x.shape
    columns, problems = y.shape[3], batch * kv_heads
    options = _options(x, heads // kv_heads, normalize)
    blocks = triton.cdiv(width, options["BLOCK"]) * triton.cdiv(columns, options["BLOCK"])
    tiles = triton.cdiv(length, CHUNK)
    segments = max(1, min(tiles, triton.cdiv(4 * processors(x.device), blocks * problems)))
    each = triton.cdiv(tiles, segments)
    segments = triton.cdiv(tiles, each)
    parts = x.new_empty((segments, batch, kv_heads, width, columns + int(normalize)), dtype=torch.float32)
    launcher(summed, (blocks, segments, problems))(
        x, y, weight, parts, *strides(x), *strides(y), length, scale, width, columns, kv_heads, tiles, each,
        WEIGHTED=weight is not None, **options,
    )  # fmt: skip
    total = parts.sum(0)
    return total if start is None else total + start.float()


def _multiply(
    x: Tensor,
    state: Tensor,
    weight: Tensor | None,
    out: Tensor,
    scale: float,
    normalize: bool,
    transposed: bool,
    divide: bool = False,
) -> Tensor:
    """Writes ``out``; see ``product``."""
    batch, heads, length, _ = x.shape
    kv_heads, width, columns = state.shape[1], state.shape[2], state.shape[3] - int(normalize)
    options = _options(x, heads // kv_heads, normalize)
    grid = (triton.cdiv(length, CHUNK), batch * heads, triton.cdiv(out.shape[3], options["BLOCK"]))
    launcher(product, grid)(
        x, state, weight, out, *strides(x), *strides(out), length, scale, width, columns, kv_heads,
        TRANSPOSED=transposed, DIVIDE=divide, WEIGHTED=weight is not None, **options,
    )  # fmt: skip
    return out


def forward(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, H, Tq, Dv]`` in v's dtype, and the state of all tokens."""
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype, device=q.device)
    q, k, v, _ = prepare(q, k, v, None, scale, normalize).tensors
    state = _sum(k, v, None, initial_state, k.shape[1], 1.0, normalize)
    return _multiply(q, state, None, out, scale, normalize, False, divide=normalize), state


def backward(
    grad_o: Tensor,
    grad_state: Tensor,
    o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize: bool,
) -> Grads:
    """Gradients for q, k, v, (no decay,) initial_state; the state is summed up again."""
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q, k, v, _ = prepare(q, k, v, None, scale, normalize).tensors
    grad = unit_columns(grad_o.to(q.dtype))
    state = _sum(k, v, None, initial_state, k.shape[1], 1.0, normalize)
    weight = None
    if normalize:
        assert o is not None
        # Small beside the rest: one number a row of q.
        z = torch.matmul(_grouped(q, k.shape[1]).float(), state[..., -1:]).reshape(q.shape[:3]) * scale
        inverse = 1.0 / (z + EPS.value)
        weight = torch.stack((inverse, -(o.float() * grad_o.float()).sum(-1) * inverse))
    slopes = _sum(q, grad, weight, grad_state, k.shape[1], scale, normalize)
    _multiply(grad, state, weight, d_q, scale, normalize, True)
    _multiply(v, slopes, None, d_k, 1.0, normalize, True)
    _multiply(k, slopes, None, d_v, 1.0, normalize, False)
    d_initial = None if initial_state is None else slopes.to(initial_state.dtype)
    return d_q, d_k, d_v, None, d_initial


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """``[B, Hkv, G · T, D]``."""
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[3])
