# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc"
"""``int6_linear`` in Triton's Gluon: for a few tokens (Ampere and later), and for many (Hopper).

**Few tokens** (:func:`tile_kernel`). A warp owns 16·ROWS weight rows and up to 32 tokens, and touches neither shared
memory nor a barrier: packed weights go from device memory to registers, are unpacked there into exactly the fragments
that ``mma.m16n8k32`` reads, and the next group's planes are already on their way. That takes control of which thread
holds what, so layouts are spelled out and the products are inline PTX: a tensor of layout TILE *is* a fragment. With
``lane = 4·g + t``, a thread holds rows g and g + 8 and the 32-bit words 2t and 2t + 1 of a slice of 32 codes (or, of a
product, the tokens 2t and 2t + 1).

A sum over k does not mind the order of k: both operands use the one that makes weights' loads contiguous. Codes of
activations are stored so (FRAGMENT in ``triton_kernels.quantize_kernel``): byte ``64·(s//2) + 16·t + 8·(s%2) + j`` of a
group of 128 is the code of ``k = 32·s + 8·t + j``.

**Many tokens** (:func:`prefill_kernel`). Unpacked weights and activation codes arrive by TMA, a ring of groups ahead; a
tile of 128 × 256 keeps what crosses the L2 cache low. Its integer product is taken in chunks of rows, so that only one
chunk's 32-bit sums are in registers beside the float32 ones, and one warp group scales while the other multiplies.

Sums inside a group are exact integers everywhere; groups are added in float32.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .unpack_ptx import UNPACK_FIRST, UNPACK_SECOND

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, then 3.9
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # likewise
_FIRST = gl.constexpr(UNPACK_FIRST)
_SECOND = gl.constexpr(UNPACK_SECOND)


def _products(tiles: int) -> tuple[str, str]:
    """PTX (and its constraints) of a group: ``tiles`` blocks of 8 tokens, four slices each.

    Operands: 4 accumulators per block; then the weights' and the activations' words of the four slices, 4 each: rows
    g: 2t, 2t + 1, rows g + 8: 2t, 2t + 1; tokens likewise, so that two blocks of tokens come in one tensor.
    """
    first = 4 * tiles
    lines = [".reg .b32 zero; mov.b32 zero, 0;"]
    for tile in range(tiles):
        sums = ", ".join(f"${4 * tile + i}" for i in range(4))
        for part in range(4):
            weights = ", ".join(f"${first + 4 * part + i}" for i in (0, 2, 1, 3))
            tokens = ", ".join(f"${first + 16 + 4 * part + 2 * tile + i}" for i in (0, 1))
            before = "zero, zero, zero, zero" if part == 0 else sums
            operands = f"{{{sums}}}, {{{weights}}}, {{{tokens}}}, {{{before}}};"
            lines.append("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 " + operands)
    return "{ " + " ".join(lines) + " }", ",".join(["=&r"] * first + ["r"] * 32)


_ONE = gl.constexpr(_products(1)[0])
_ONE_OPERANDS = gl.constexpr(_products(1)[1])
_TWO = gl.constexpr(_products(2)[0])
_TWO_OPERANDS = gl.constexpr(_products(2)[1])


@functools.cache
def layouts(rows_per_warp: int, warps: int) -> tuple[Any, Any]:
    """TILE of ``[ROWS, 16·warps, 8]`` words, and the layout that loads ``[16·warps, 16]`` activation words."""
    across = [1 << bit for bit in range(warps.bit_length() - 1)]
    more = [[1 << bit, 0, 0] for bit in range(rows_per_warp.bit_length() - 1)]
    tile = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 8, 0], *more],
        [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 16 * warp, 0] for warp in across], [], [rows_per_warp, 16 * warps, 8],
    )  # fmt: skip
    loads = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16 * warp, 0] for warp in across], [], [16 * warps, 16],
    )  # fmt: skip
    return tile, loads


@gluon.jit
def _spread(words, ROWS: gl.constexpr, TILE: gl.constexpr):
    """``[16·warps, 4, 2]`` words as a slice of every row block: the same registers, whatever ROWS is."""
    flat = gl.convert_layout(words.reshape([words.shape[0], 8]), gl.SliceLayout(0, TILE), assert_trivial=True)
    return gl.expand_dims(flat, 0) + gl.zeros([ROWS, words.shape[0], 8], gl.int32, TILE)


@gluon.jit
def _pair(pointers, ROWS: gl.constexpr, TILE: gl.constexpr):
    """Two slices of activation codes from one 16-byte load per thread."""
    words = gl.load(pointers)
    even, odd = gl.split(words.reshape([words.shape[0], 4, 2, 2]).permute(0, 1, 3, 2))
    return _spread(even, ROWS, TILE), _spread(odd, ROWS, TILE)


@gluon.jit
def _store(y_ptr, acc, bias, rows, tokens, M, N, WHOLE: gl.constexpr):
    if WHOLE:
        acc = acc * 0.25 + bias
    part = gl.program_id(2).to(gl.int64)
    out = y_ptr + (part * M + tokens) * N + rows
    gl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rows < N) & (tokens < M))


@gluon.jit(do_not_specialize=["M", "N"])
def tile_kernel(
    a_ptr, sa_ptr, hi_ptr, lo_ptr, sw_ptr, bias_ptr, y_ptr, M, N, M_PAD, K_WORDS, HI_WORDS, LO_WORDS, G,
    BM: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, SPLIT: gl.constexpr, BIAS: gl.constexpr,
    TILE: gl.constexpr, LOADS: gl.constexpr,
):  # fmt: skip
    """BM (8, 16 or 32) tokens by 16·ROWS·WARPS weight rows; pointers to 32-bit words; scales ``sa [G, M_PAD]``.

    With SPLIT > 1 the groups are shared out over the third grid axis, and ``y`` is float32 ``[SPLIT, M, N]``. Codes and
    scales of tokens from M to M_PAD are read but reach no result that is stored.
    """
    HEIGHT: gl.constexpr = 16 * WARPS
    block = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, TILE)))
    inner = gl.arange(0, HEIGHT, gl.SliceLayout(0, gl.SliceLayout(2, TILE)))
    word = gl.expand_dims(gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, TILE))), 0), 1)
    rows = gl.expand_dims(gl.expand_dims(block, 1), 2) * HEIGHT + gl.expand_dims(gl.expand_dims(inner, 0), 2)
    rows += gl.program_id(0) * (ROWS * HEIGHT)
    row = gl.minimum(rows, N - 1).to(gl.int64)  # rows past the end read the last one and are never stored
    hi, lo, sw = hi_ptr + row * HI_WORDS + word, lo_ptr + row * LO_WORDS + word, sw_ptr + row * G
    first_token = gl.program_id(1) * BM
    # The token of an activation word is its row within the warp: a fragment has as many tokens as weight rows.
    token = first_token + gl.arange(0, HEIGHT, gl.SliceLayout(1, LOADS)) % (16 if BM > 8 else 8)
    a = a_ptr + gl.expand_dims(token * K_WORDS, 1) + gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, LOADS)), 0)
    sa = sa_ptr + first_token + word
    acc0 = gl.zeros([ROWS, HEIGHT, 8], gl.float32, TILE)
    acc1, acc2, acc3 = acc0, acc0, acc0
    share = (G + SPLIT - 1) // SPLIT
    first = gl.program_id(2) * share
    last = gl.minimum(first + share, G)
    start = gl.minimum(first, G - 1)  # a split may be empty
    bits, nibbles0, nibbles1 = gl.load(lo + start * 8), gl.load(hi + start * 16), gl.load(hi + start * 16 + 8)
    for group in range(first, last):
        ahead = gl.minimum(group + 1, last - 1)
        next_bits, next0 = gl.load(lo + ahead * 8), gl.load(hi + ahead * 16)
        next1 = gl.load(hi + ahead * 16 + 8)
        scale = gl.load(sw + group).to(gl.float32)
        tokens_scale = sa + group * M_PAD
        w0, w1 = gl.inline_asm_elementwise(
            _FIRST, "=&r,=&r,r,r", [nibbles0, bits], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        w2, w3 = gl.inline_asm_elementwise(
            _SECOND, "=&r,=&r,r,r", [nibbles1, bits], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        b0, b1 = _pair(a + group * 32, ROWS, TILE)
        b2, b3 = _pair(a + group * 32 + 16, ROWS, TILE)
        if BM == 8:
            part = gl.inline_asm_elementwise(
                _ONE, _ONE_OPERANDS, [w0, w1, w2, w3, b0, b1, b2, b3], dtype=gl.int32, is_pure=True, pack=4
            )
            acc0 += part.to(gl.float32) * (scale * gl.load(tokens_scale))
        else:
            part, other = gl.inline_asm_elementwise(
                _TWO, _TWO_OPERANDS, [w0, w1, w2, w3, b0, b1, b2, b3],
                dtype=(gl.int32, gl.int32), is_pure=True, pack=4,
            )  # fmt: skip
            acc0 += part.to(gl.float32) * (scale * gl.load(tokens_scale))
            acc1 += other.to(gl.float32) * (scale * gl.load(tokens_scale + 8))
        if BM == 32:
            b0, b1 = _pair(a + 16 * K_WORDS + group * 32, ROWS, TILE)
            b2, b3 = _pair(a + 16 * K_WORDS + group * 32 + 16, ROWS, TILE)
            part, other = gl.inline_asm_elementwise(
                _TWO, _TWO_OPERANDS, [w0, w1, w2, w3, b0, b1, b2, b3],
                dtype=(gl.int32, gl.int32), is_pure=True, pack=4,
            )  # fmt: skip
            acc2 += part.to(gl.float32) * (scale * gl.load(tokens_scale + 16))
            acc3 += other.to(gl.float32) * (scale * gl.load(tokens_scale + 24))
        bits, nibbles0, nibbles1 = next_bits, next0, next1
    bias = gl.full([1, 1, 1], 0.0, gl.float32, TILE)
    if BIAS and SPLIT == 1:
        bias = gl.load(bias_ptr + row).to(gl.float32)
    _store(y_ptr, acc0, bias, rows, first_token + word, M, N, SPLIT == 1)
    if BM > 8:
        _store(y_ptr, acc1, bias, rows, first_token + 8 + word, M, N, SPLIT == 1)
    if BM > 16:
        _store(y_ptr, acc2, bias, rows, first_token + 16 + word, M, N, SPLIT == 1)
        _store(y_ptr, acc3, bias, rows, first_token + 24 + word, M, N, SPLIT == 1)


def descriptor(codes: Tensor, rows: int) -> Any:
    """TMA descriptor of int8 ``codes [R, K]`` in boxes of ``rows`` by one group."""
    return TensorDescriptor.from_tensor(codes, [rows, 128], gl.NVMMASharedLayout.get_default_for([rows, 128], gl.int8))


@gluon.jit
def _fill(a_desc, w_desc, a_ring, w_ring, ready, group, first_token, first_row, STAGES: gl.constexpr):
    """Start copying a group of both operands into its slot of the ring."""
    slot = group % STAGES
    barrier = ready.index(slot)
    mbarrier.expect(barrier, a_desc.block_type.nbytes + w_desc.block_type.nbytes)
    _load(a_desc, [first_token, group * 128], barrier, a_ring.index(slot))
    _load(w_desc, [first_row, group * 128], barrier, w_ring.index(slot))


@gluon.jit
def _chunk(a, w, index: gl.constexpr, CHUNK: gl.constexpr, zero):
    """Start the product of all tokens with one chunk of rows."""
    return warpgroup_mma(a, w.slice(index * CHUNK, CHUNK, 0).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _scaled(acc, product, token_scale, row_scale):
    product = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
    # Multiplied one after the other: the products of the scales would cost as many registers as the sums.
    return acc + (product.to(gl.float32) * gl.expand_dims(token_scale, 1)) * gl.expand_dims(row_scale, 0)


@gluon.jit
def _store_chunk(y_ptr, bias_ptr, acc, tokens, rows, M, N, BIAS: gl.constexpr):
    acc = acc * 0.25
    if BIAS:
        bias = gl.load(bias_ptr + gl.minimum(rows, N - 1)).to(gl.float32)
        acc += gl.expand_dims(bias, 0)
    out = y_ptr + gl.expand_dims(tokens.to(gl.int64) * N, 1) + gl.expand_dims(rows, 0)
    gl.store(out, acc.to(y_ptr.dtype.element_ty), mask=gl.expand_dims(tokens < M, 1) & gl.expand_dims(rows < N, 0))


@gluon.jit(do_not_specialize=["M", "N"])
def prefill_kernel(
    a_desc, w_desc, sa_ptr, sw_ptr, bias_ptr, y_ptr, M, N, M_PAD, N_PAD, G,
    BM: gl.constexpr, BN: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    WARPS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """BM tokens by BN rows of unpacked weights, in 2 or 4 chunks of rows; scales ``[G, M_PAD]`` and ``[G, N_PAD]``."""
    gl.static_assert(BN == 2 * CHUNK or BN == 4 * CHUNK)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, CHUNK, 32]
    )
    # Programs of a band of BAND token tiles walk the weight tiles together, so that both stay in the L2 cache.
    tiles_m, tiles_n = (M + BM - 1) // BM, (N + BN - 1) // BN
    index, per_band = gl.program_id(0), BAND * tiles_n
    band = index // per_band
    height = gl.minimum(tiles_m - band * BAND, BAND)
    first_token = (band * BAND + (index % per_band) % height) * BM
    first_row = ((index % per_band) // height) * BN
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, 128], a_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN, 128], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    _barrier()
    for stage in gl.static_range(STAGES - 1):
        if stage < G:
            _fill(a_desc, w_desc, a_ring, w_ring, ready, stage, first_token, first_row, STAGES)
    tokens = first_token + gl.arange(0, BM, gl.SliceLayout(1, SUMS))
    rows = first_row + gl.arange(0, CHUNK, gl.SliceLayout(0, SUMS))
    sa, sw = sa_ptr + tokens, sw_ptr + rows
    zero = gl.zeros([BM, CHUNK], gl.int32, SUMS)
    acc0 = gl.zeros([BM, CHUNK], gl.float32, SUMS)
    acc1, acc2, acc3 = acc0, acc0, acc0
    scale, even = gl.load(sa), gl.load(sw)
    for group in range(G):
        ahead = gl.minimum(group + 1, G - 1)
        slot = group % STAGES
        mbarrier.wait(ready.index(slot), group // STAGES & 1)
        _barrier()  # everyone is done with the group before: its slot may be filled again
        if group + STAGES - 1 < G:
            _fill(a_desc, w_desc, a_ring, w_ring, ready, group + STAGES - 1, first_token, first_row, STAGES)
        a, w = a_ring.index(slot), w_ring.index(slot)
        # The scales of the next chunk are read while this one's product runs.
        product = _chunk(a, w, 0, CHUNK, zero)
        odd = gl.load(sw + group * N_PAD + CHUNK)
        acc0 = _scaled(acc0, product, scale, even)
        product = _chunk(a, w, 1, CHUNK, zero)
        next_scale = gl.load(sa + ahead * M_PAD)
        if BN == 4 * CHUNK:
            even = gl.load(sw + group * N_PAD + 2 * CHUNK)
            acc1 = _scaled(acc1, product, scale, odd)
            product = _chunk(a, w, 2, CHUNK, zero)
            odd = gl.load(sw + group * N_PAD + 3 * CHUNK)
            acc2 = _scaled(acc2, product, scale, even)
            product = _chunk(a, w, 3, CHUNK, zero)
            even = gl.load(sw + ahead * N_PAD)
            acc3 = _scaled(acc3, product, scale, odd)
        else:
            even = gl.load(sw + ahead * N_PAD)
            acc1 = _scaled(acc1, product, scale, odd)
        scale = next_scale
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    _store_chunk(y_ptr, bias_ptr, acc0, tokens, rows, M, N, BIAS)
    _store_chunk(y_ptr, bias_ptr, acc1, tokens, rows + CHUNK, M, N, BIAS)
    if BN == 4 * CHUNK:
        _store_chunk(y_ptr, bias_ptr, acc2, tokens, rows + 2 * CHUNK, M, N, BIAS)
        _store_chunk(y_ptr, bias_ptr, acc3, tokens, rows + 3 * CHUNK, M, N, BIAS)
