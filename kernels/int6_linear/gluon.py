# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc"
"""``int6_linear`` for a few tokens on Hopper, in Triton's Gluon.

Packed weights, two groups at a time, and activation codes arrive in shared memory by TMA, a ring of stages ahead: what
is under way fills the memory bus whatever the warps are doing. A warp owns 16·ROWS weight rows and all tokens of its
block, and unpacks in registers into exactly the fragments that ``mma.m16n8k32`` reads. That takes control of which
thread holds what, so layouts are spelled out and the products are inline PTX: a tensor of layout TILE *is* a fragment.

With ``lane = 4·g + t``, a thread reads 16 bytes of the nibble plane of a row's group: ``t``'s high bit says whether
those of slices 0 and 1 or of 2 and 3 (the two-bit plane's bits move by as much), its low bit which half of them. Slices
0 and 2 make the fragments of products 0 and 1, slices 1 and 3 those of 2 and 3: a sum over k does not mind the order of
k, and activation codes are stored in the same (FRAGMENT in ``triton_kernels.quantize_kernel``: slices 0, 2, 1, 3).

The eight rows that a warp reads at once are ``g``'s bits in the order 4, 1, 2: neighbouring lanes then read rows that
the swizzle puts into different banks. It holds for tokens, too: column n of a product is token ``4·(n mod 2) + n div
2`` of its eight.

Sums inside a group are exact integers; groups are added in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .unpack_ptx import UNPACK_FIRST

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, then 3.9
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # likewise
_shared = gl.shared_memory_descriptor
_reinterpret = getattr(_shared, "reinterpret", None) or _shared._reinterpret  # 3.9, then 3.6
_UNPACK = gl.constexpr(UNPACK_FIRST)


def _products() -> tuple[str, str]:
    """PTX (and its constraints) of a group: 16 weight rows by two blocks of 8 tokens, four products each.

    Operands: 4 sums per block; then 4 words of weights (rows g: two, rows g + 8: two) for each product, and as many of
    activations (tokens g, then g + 8).
    """
    lines = [".reg .b32 zero; mov.b32 zero, 0;"]
    for tile in range(2):
        sums = ", ".join(f"${4 * tile + i}" for i in range(4))
        for part in range(4):
            weights = ", ".join(f"${8 + 4 * part + i}" for i in (0, 2, 1, 3))
            tokens = ", ".join(f"${24 + 4 * part + 2 * tile + i}" for i in (0, 1))
            before = "zero, zero, zero, zero" if part == 0 else sums
            operands = f"{{{sums}}}, {{{weights}}}, {{{tokens}}}, {{{before}}};"
            lines.append("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 " + operands)
    return "{ " + " ".join(lines) + " }", ",".join(["=&r"] * 8 + ["r"] * 32)


_PRODUCTS = gl.constexpr(_products()[0])
_OPERANDS = gl.constexpr(_products()[1])


@functools.cache
def layouts(rows_per_warp: int, warps: int) -> tuple[Any, ...]:
    """TILE ``[blocks of 16 rows, 16, 8]``; UNPACK ``[blocks, 16, t high, t low, word, pair, group]``; and how the
    nibble plane ``[rows, 32]``, the two-bit plane ``[rows, 16]``, activations ``[16, 32]`` and scales ``[2, rows]``
    are read from shared memory.
    """
    linear = gl.DistributedLinearLayout
    more = [1 << bit for bit in range(rows_per_warp.bit_length() - 1)]
    across = [rows_per_warp << bit for bit in range(warps.bit_length() - 1)]
    blocks = rows_per_warp * warps
    tile = linear(
        [[0, 0, 1], [0, 8, 0], *([b, 0, 0] for b in more)],
        [[0, 0, 2], [0, 0, 4], [0, 4, 0], [0, 1, 0], [0, 2, 0]],
        [[b, 0, 0] for b in across], [], [blocks, 16, 8],
    )  # fmt: skip
    unpack = linear(
        [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1], [0, 8, 0, 0, 0, 0, 0],
         *([b, 0, 0, 0, 0, 0, 0] for b in more)],
        [[0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0],
         [0, 4, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0]],
        [[b, 0, 0, 0, 0, 0, 0] for b in across], [], [blocks, 16, 2, 2, 2, 2, 2],
    )  # fmt: skip
    lane_rows = [[4, 0], [1, 0], [2, 0]]
    rows, warp_rows = [[16 * b, 0] for b in more], [[16 * b, 0] for b in across]
    high = linear(
        [[0, 1], [0, 2], [0, 16], [8, 0], *rows], [[0, 4], [0, 8], *lane_rows], warp_rows, [], [16 * blocks, 32]
    )
    low = linear(
        [[0, 1], [0, 2], [0, 8], [8, 0], *rows], [[0, 4], [0, 0], *lane_rows], warp_rows, [], [16 * blocks, 16]
    )
    tokens = linear(
        [[0, 1], [0, 2], [0, 16], [8, 0]], [[0, 4], [0, 8], *lane_rows], [[0, 0] for _ in across], [], [16, 32]
    )
    scales = linear(
        [[1, 0], [0, 8], *([0, 16 * b] for b in more)], [[0, 0], [0, 0], [0, 4], [0, 1], [0, 2]],
        [[0, 16 * b] for b in across], [], [2, 16 * blocks],
    )  # fmt: skip
    return tile, unpack, high, low, tokens, scales


_TYPES = {
    torch.int8: gl.int8, torch.int32: gl.int32, torch.float32: gl.float32, torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}  # fmt: skip


@functools.cache
def _box(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """How a box lies in shared memory; one of scales in plain order."""
    if dtype == torch.float32 and rows == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _TYPES[dtype])


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """TMA descriptor of a matrix in boxes of ``rows`` by ``columns``; its rows begin at multiples of 16 bytes."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns], _box(rows, columns, matrix.dtype))


@gluon.jit
def _fill(a_desc, hi_desc, lo_desc, a_ring, hi_ring, lo_ring, ready, slot, a_row, row, group):
    """Start copying two groups of all operands into a slot of the ring."""
    barrier = ready.index(slot)
    mbarrier.expect(barrier, a_desc.block_type.nbytes + hi_desc.block_type.nbytes + lo_desc.block_type.nbytes)
    _load(hi_desc, [row, group * 16], barrier, hi_ring.index(slot))
    _load(lo_desc, [row, group * 8], barrier, lo_ring.index(slot))
    _load(a_desc, [a_row, 0], barrier, a_ring.index(slot))


@gluon.jit
def _fragment(words, BLOCKS: gl.constexpr, TILE: gl.constexpr):
    """``[blocks, 16, 2, 2, 2]`` words as the fragment that they are."""
    return gl.convert_layout(words.reshape([BLOCKS, 16, 8]), TILE, assert_trivial=True)


@gluon.jit
def _weights(hi, lo, BLOCKS: gl.constexpr, UNPACK: gl.constexpr):
    """Unpacked words ``[blocks, 16, t high, t low, word, pair, group]`` of the even and of the odd slices."""
    hi = hi.reshape([BLOCKS, 16, 2, 2, 2, 2, 2]).permute(0, 1, 3, 4, 6, 5, 2)
    hi = gl.convert_layout(hi, UNPACK, assert_trivial=True)
    lo = lo.reshape([BLOCKS, 16, 2, 2, 2, 2]).permute(0, 1, 3, 5, 4, 2)
    lo = gl.expand_dims(gl.convert_layout(lo, gl.SliceLayout(2, UNPACK), assert_trivial=True), 2)
    return gl.inline_asm_elementwise(
        _UNPACK, "=&r,=&r,r,r", [hi, lo >> _high_bits(UNPACK)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _high_bits(UNPACK: gl.constexpr):
    """By how much a thread's two-bit fields stand higher: ``[1, 1, 2, 1, 1, 1, 1]``."""
    one: gl.constexpr = gl.SliceLayout(1, UNPACK)
    two: gl.constexpr = gl.SliceLayout(2, one)
    three: gl.constexpr = gl.SliceLayout(2, two)
    four: gl.constexpr = gl.SliceLayout(2, three)
    five: gl.constexpr = gl.SliceLayout(2, four)
    flat = gl.arange(0, 2, gl.SliceLayout(0, five)) * 4
    shift = gl.expand_dims(gl.expand_dims(gl.expand_dims(flat, 0), 2), 2)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(shift, 2), 2), 1)


@gluon.jit
def _activations(tile, BLOCKS: gl.constexpr, TILE: gl.constexpr, TOKENS: gl.constexpr):
    """The four products' words of 16 tokens, the same for every block of rows."""
    words = tile.load(TOKENS).reshape([16, 2, 2, 2, 2, 2]).permute(0, 2, 3, 5, 4, 1)
    even, odd = gl.split(words)
    e0, e1 = gl.split(even)
    o0, o1 = gl.split(odd)
    zero = gl.zeros([BLOCKS, 16, 8], gl.int32, TILE)
    return _spread(e0, zero, TILE), _spread(e1, zero, TILE), _spread(o0, zero, TILE), _spread(o1, zero, TILE)


@gluon.jit
def _spread(words, zero, TILE: gl.constexpr):
    flat = gl.convert_layout(words.reshape([16, 8]), gl.SliceLayout(0, TILE), assert_trivial=True)
    return gl.expand_dims(flat, 0) + zero


@gluon.jit
def _multiply(w0, w1, w2, w3, a, BLOCKS: gl.constexpr, TILE: gl.constexpr, TOKENS: gl.constexpr):
    b0, b1, b2, b3 = _activations(a, BLOCKS, TILE, TOKENS)
    return gl.inline_asm_elementwise(
        _PRODUCTS, _OPERANDS, [w0, w1, w2, w3, b0, b1, b2, b3], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
    )


@gluon.jit
def _group(
    even, odd, a, scale, s0, s1, s2, s3, acc0, acc1, acc2, acc3,
    BM: gl.constexpr, FIRST: gl.constexpr, BLOCKS: gl.constexpr, TILE: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """One group's products, scaled and added; s0 to s3 are the scales of a block's tokens, eight each."""
    e0, e1 = gl.split(even)
    o0, o1 = gl.split(odd)
    w0, w1 = _fragment(e0, BLOCKS, TILE), _fragment(e1, BLOCKS, TILE)
    w2, w3 = _fragment(o0, BLOCKS, TILE), _fragment(o1, BLOCKS, TILE)
    part, other = _multiply(w0, w1, w2, w3, a.slice(FIRST, 16, 0), BLOCKS, TILE, TOKENS)
    acc0 += part.to(gl.float32) * (scale * s0)
    acc1 += other.to(gl.float32) * (scale * s1)
    if BM == 32:
        part, other = _multiply(w0, w1, w2, w3, a.slice(FIRST + 16, 16, 0), BLOCKS, TILE, TOKENS)
        acc2 += part.to(gl.float32) * (scale * s2)
        acc3 += other.to(gl.float32) * (scale * s3)
    return acc0, acc1, acc2, acc3


@gluon.jit
def _token_scales(sa, inside, BM: gl.constexpr):
    s0, s1 = gl.load(sa, mask=inside, other=0.0), gl.load(sa + 8, mask=inside, other=0.0)
    if BM == 32:
        return s0, s1, gl.load(sa + 16, mask=inside, other=0.0), gl.load(sa + 24, mask=inside, other=0.0)
    else:
        return s0, s1, s0, s1


@gluon.jit
def _row_scales(pair, BLOCKS: gl.constexpr, TILE: gl.constexpr, SCALES: gl.constexpr):
    """The rows' scales of two groups, ``[blocks, 16, 1]`` each."""
    one, two = gl.split(pair.load(SCALES).to(gl.float32).reshape([2, BLOCKS, 16]).permute(1, 2, 0))
    rows: gl.constexpr = gl.SliceLayout(2, TILE)
    one = gl.convert_layout(one, rows, assert_trivial=True)
    two = gl.convert_layout(two, rows, assert_trivial=True)
    return gl.expand_dims(one, 2), gl.expand_dims(two, 2)


@gluon.jit
def _store(y_ptr, acc, bias, rows, tokens, M, N, WHOLE: gl.constexpr):
    if WHOLE:
        acc = acc * 0.25 + bias
    part = gl.program_id(2).to(gl.int64)
    out = y_ptr + (part * M + tokens) * N + rows
    gl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rows < N) & (tokens < M))


@gluon.jit(do_not_specialize=["M", "N"])
def few_kernel(
    a_desc, hi_desc, lo_desc, sa_ptr, sw_ptr, bias_ptr, y_ptr, M, N, M_PAD, G,
    BM: gl.constexpr, BLOCKS: gl.constexpr, SPAN: gl.constexpr, SHARE: gl.constexpr, STAGES: gl.constexpr,
    WHOLE: gl.constexpr, BIAS: gl.constexpr, TILE: gl.constexpr, UNPACK: gl.constexpr, HIGH: gl.constexpr,
    LOW: gl.constexpr, TOKENS: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    """BM (16 or 32) tokens by 16·BLOCKS weight rows; activation scales ``sa [G, M_PAD]``.

    The third grid axis shares the groups out, SPAN each (even; SHARE is the next power of two); unless that is one
    (WHOLE), ``y`` is float32 ``[shares, M, N]``. Codes and scales of tokens past M are read but reach no result that is
    stored.
    """
    HEIGHT: gl.constexpr = 16 * BLOCKS
    first = gl.program_id(2) * SPAN
    steps = (gl.minimum(G - first, SPAN) + 1) // 2
    first_row, block = gl.program_id(0) * HEIGHT, gl.program_id(1)
    a_row = (block * G + first) * BM
    a_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 2 * BM, 32], a_desc.layout)
    hi_ring = gl.allocate_shared_memory(gl.int32, [STAGES, HEIGHT, 32], hi_desc.layout)
    lo_ring = gl.allocate_shared_memory(gl.int32, [STAGES, HEIGHT, 16], lo_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    _barrier()
    for stage in gl.static_range(STAGES - 1):
        if stage < steps:
            _fill(a_desc, hi_desc, lo_desc, a_ring, hi_ring, lo_ring, ready, stage, a_row + 2 * stage * BM,
                  first_row, first + 2 * stage)  # fmt: skip
    # The rows' scales of all groups, by group: a scale lies in a sector with those of 15 others, needed later.
    SPREAD: gl.constexpr = gl.BlockedLayout([SHARE, 1], [1, 32], [1, gl.num_warps()], [0, 1])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    all_scales = gl.allocate_shared_memory(gl.float16, [SHARE, HEIGHT], PLAIN)
    column = gl.expand_dims(gl.arange(0, SHARE, gl.SliceLayout(1, SPREAD)), 1)
    line = gl.expand_dims(gl.arange(0, HEIGHT, gl.SliceLayout(0, SPREAD)), 0)
    sw = sw_ptr + gl.minimum(first_row + line, N - 1).to(gl.int64) * G + (first + column)
    # Groups past the last count as zero: their codes are not the model's.
    all_scales.store(gl.load(sw, mask=first + column < G, other=0.0))
    scales = _reinterpret(all_scales, gl.float16, [SHARE // 2, 2, HEIGHT], PLAIN)
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, TILE)))
    token = block * BM + (word % 2) * 4 + word // 2
    token = gl.expand_dims(gl.expand_dims(token, 0), 1)
    sa = sa_ptr + token
    acc0 = gl.zeros([BLOCKS, 16, 8], gl.float32, TILE)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for step in range(steps):
        slot, group = step % STAGES, first + 2 * step
        # Read before the wait, which their way from the L2 cache then overlaps.
        s0, s1, s2, s3 = _token_scales(sa + group * M_PAD, token >= 0, BM)
        t0, t1, t2, t3 = _token_scales(sa + (group + 1) * M_PAD, (token >= 0) & (group + 1 < G), BM)
        mbarrier.wait(ready.index(slot), step // STAGES & 1)
        _barrier()  # everyone is done with the step before: its slot may be filled again
        ahead = step + STAGES - 1
        if ahead < steps:
            _fill(a_desc, hi_desc, lo_desc, a_ring, hi_ring, lo_ring, ready, ahead % STAGES, a_row + 2 * ahead * BM,
                  first_row, first + 2 * ahead)  # fmt: skip
        even, odd = _weights(hi_ring.index(slot).load(HIGH), lo_ring.index(slot).load(LOW), BLOCKS, UNPACK)
        even0, even1 = gl.split(even)
        odd0, odd1 = gl.split(odd)
        scale0, scale1 = _row_scales(scales.index(step), BLOCKS, TILE, SCALES)
        a = a_ring.index(slot)
        acc0, acc1, acc2, acc3 = _group(
            even0, odd0, a, scale0, s0, s1, s2, s3, acc0, acc1, acc2, acc3, BM, 0, BLOCKS, TILE, TOKENS
        )
        acc0, acc1, acc2, acc3 = _group(
            even1, odd1, a, scale1, t0, t1, t2, t3, acc0, acc1, acc2, acc3, BM, BM, BLOCKS, TILE, TOKENS
        )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    inner = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, TILE))), 0)
    outer = gl.expand_dims(gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, TILE))), 1)
    rows = first_row + gl.expand_dims(outer * 16 + inner, 2)
    bias = gl.full([1, 1, 1], 0.0, gl.float32, TILE)
    if BIAS and WHOLE:
        bias = gl.load(bias_ptr + gl.minimum(rows, N - 1)).to(gl.float32)
    _store(y_ptr, acc0, bias, rows, token, M, N, WHOLE)
    _store(y_ptr, acc1, bias, rows, token + 8, M, N, WHOLE)
    if BM == 32:
        _store(y_ptr, acc2, bias, rows, token + 16, M, N, WHOLE)
        _store(y_ptr, acc3, bias, rows, token + 24, M, N, WHOLE)
