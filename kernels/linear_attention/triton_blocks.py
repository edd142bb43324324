# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Building blocks of the linear-attention kernels: tiles, running decays, scores.

A chunk's log-decays ``g [BT, BK]`` become running sums through one matrix product with a 0/±1 matrix, which is exact
for bfloat16 gates and lands in the same register layout as the scores.

Two ways to spread a decay over the two factors of a score (names as in ``reference.py``):

* anchored: both factors are taken about the chunk's middle, ``q e^Δ`` and ``k e^-Δ``. One product per chunk; used
  where no half chunk decays by more than ``e^-LIMIT``. Masked entries may overflow: they are selected away.
* halved: the chunk is cut in two again and again. A score between the halves of a block has factors that are ``exp``
  of non-positive sums, so any decay down to ``-inf`` is right, at one product per halving; blocks that decay little
  enough are anchored about their own middles and cut no further. How often a chunk is cut is its ``depth``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_device import LOG2E

# exp(-1e4) is 0 in float32, and a matrix product with -inf would give NaN.
FLOOR: tl.constexpr = tl.constexpr(-1e4)
# Triton's interpreter multiplies bfloat16 by its bit patterns: there, everything runs in float32.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
EPS: tl.constexpr = tl.constexpr(1e-10)


@triton.jit
def chunk_rows(table, chunk, T, BT: tl.constexpr, VARLEN: tl.constexpr):
    """A chunk's first row and the row after its sequence's last; sequences of their own lengths are in ``table``."""
    if VARLEN:
        return tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
    else:
        return chunk * BT, T


@triton.jit
def segment_chunks(runs, segment, PER_SEGMENT, CHUNKS, VARLEN: tl.constexpr):
    """A segment's first chunk and how many it has."""
    if VARLEN:
        return tl.load(runs + 2 * segment), tl.load(runs + 2 * segment + 1)
    else:
        return segment * PER_SEGMENT, tl.minimum(PER_SEGMENT, CHUNKS - segment * PER_SEGMENT)


@triton.jit
def load_rows(base, stride, first, length, width, BT: tl.constexpr, BD: tl.constexpr):
    """Rows ``first … first + BT`` of a ``[length, width]`` matrix with unit column stride, zero outside."""
    rows, cols = tl.arange(0, BT), tl.arange(0, BD)
    pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    return tl.load(pointers, mask=(first + rows < length)[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def store_rows(base, stride, first, length, width, tile, BT: tl.constexpr, BD: tl.constexpr):
    """The inverse of ``load_rows``."""
    rows, cols = tl.arange(0, BT), tl.arange(0, BD)
    pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    mask = (first + rows < length)[:, None] & (cols < width)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_decay(base, stride, first, length, width, PER_KEY: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Log-decays ``[BT, BK]`` (a per-head decay is repeated over the keys); tokens past the end decay by 1."""
    rows, cols = tl.arange(0, BT), tl.arange(0, BK)
    inside = (first + rows < length)[:, None] & (cols < width)[None, :]
    pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride
    if PER_KEY:
        pointers = pointers + cols[None, :]
    else:
        pointers = pointers + tl.zeros([BT, BK], tl.int32)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def mix(weights, g, EXACT: tl.constexpr):
    """``weights @ g`` for 0/±1 weights, summed in float32; g is cut into bfloat16 parts: 16 bits of it, 24 if EXACT."""
    if INTERPRETED:
        return tl.dot(weights, g.to(tl.float32))
    w = weights.to(tl.bfloat16)
    if g.dtype == tl.bfloat16:
        return tl.dot(w, g)
    x = g.to(tl.float32)
    high = x.to(tl.bfloat16)
    x = x - high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    total = tl.dot(w, middle, acc=tl.dot(w, high))
    if EXACT:
        total = tl.dot(w, (x - middle.to(tl.float32)).to(tl.bfloat16), acc=total)
    return total


@triton.jit
def bounded(g):
    """Replace ``-inf`` by a decay that is still exactly 0 as a factor; NaN stays."""
    return tl.where(g < FLOOR, FLOOR, g)


@triton.jit
def from_middle(g, BT: tl.constexpr):
    """Δ_i: the log-decay from the chunk's middle to row i (positive before the middle)."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return mix((j <= i).to(tl.float32) - (j < BT // 2).to(tl.float32), g, True) * LOG2E


@triton.jit
def from_start(g, BT: tl.constexpr):
    """Log-decay from before the chunk to row i, row i's own included."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return mix((j <= i).to(tl.float32), g, True) * LOG2E


@triton.jit
def to_end(g, BT: tl.constexpr):
    """Log-decay from row i (its own excluded) to the chunk's end."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return mix((j > i).to(tl.float32), g, True) * LOG2E


@triton.jit
def halving(g, shift, innermost, BT: tl.constexpr):
    """Factors ``[BT, BK]`` for the rows of q and of k about the middle of each block of ``2**shift`` rows.

    Late rows decay from the middle, early rows to it: late rows of q meet early rows of k. In the ``innermost`` blocks
    every row of the one meets every row of the other, anchored about the middle.
    """
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    middle = ((i >> shift) << shift) + tl.maximum((1 << shift) >> 1, 1)
    late = i >= middle
    inside = (late & (j <= i) & (j >= middle)) | ((i < middle) & (j > i) & (j < middle))
    decay = mix(inside.to(tl.float32), g, True) * LOG2E
    other = tl.where(innermost, -decay, float("-inf"))
    return tl.exp2(tl.where(late, decay, other)), tl.exp2(tl.where(late, other, decay))


@triton.jit
def same_block(shift, BT: tl.constexpr):
    """Which pairs of rows share a block of ``2**shift`` rows."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return (i >> shift) == (j >> shift)


@triton.jit
def causal(scores, BT: tl.constexpr):
    """Keep keys up to the query's own row. Selected, not multiplied: the rest may be inf or NaN."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.where(i >= j, scores, 0.0)


@triton.jit
def anti_causal(scores, BT: tl.constexpr):
    """The same for transposed scores (rows are keys)."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.where(j >= i, scores, 0.0)


@triton.jit
def halved_scores(
    q, k, g, depth, TRANSPOSED: tl.constexpr, LEVELS: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr
):
    """Causal scores ``[BT, BT]`` with decay, rows q (scaled) and columns k, for BT = 2**LEVELS.

    TRANSPOSED: rows k and columns q, built as products: a transposed accumulator must not become an operand.
    """
    scores = tl.zeros([BT, BT], tl.float32)
    for shift in range(LEVELS - depth, LEVELS + 1):
        left, right = halving(g, shift, shift == LEVELS - depth, BT)
        left = (q.to(tl.float32) * left).to(k.dtype)
        right = (k.to(tl.float32) * right).to(k.dtype)
        if TRANSPOSED:
            part = anti_causal(tl.dot(right, tl.trans(left), input_precision=PRECISION), BT)
        else:
            part = causal(tl.dot(left, tl.trans(right), input_precision=PRECISION), BT)
        scores += tl.where(same_block(shift, BT), part, 0.0)
    return scores
