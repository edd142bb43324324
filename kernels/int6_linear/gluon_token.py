# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc"
"""One token's packed linear of few channels on Hopper, in Triton's Gluon: :func:`.triton_token.group_kernel` with the
exchanges between warps written out.

``token_kernel``: a warp quantizes whole groups and multiplies them with all rows of its program. Warps only tell each
other the sums of squares (NORM) and the rows' sums over their groups, each through shared memory behind one barrier;
Triton's own reductions take up to three for that, at a time when nothing else is under way.

``head_kernel``, for an output head's many rows: as many programs as the chip holds at once quantize the token, then
walk over blocks of rows. The next block's weights are on their way while one is multiplied: programs that each fetch,
quantize and multiply once wait for memory most of their time. Warps share the rows out and hold the whole token.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import triton_token as one
from .triton_kernels import inverse_root, unpack_pair


@gluon.jit
def _exchanged(values, shared, LAYOUT: gl.constexpr):
    """``values`` of all warps in another layout."""
    shared.store(values)
    return shared.load(LAYOUT)


@gluon.jit
def _channels(G, K, TAIL: gl.constexpr, GB: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the token's channels lie ``[GB, 32, 4]``, which are there, and which byte of a word each is in."""
    group = gl.arange(0, GB, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    byte = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    place, inside, _ = one.word_places(group, lane, G, K, TAIL)
    return place + byte, inside & (byte >= 0), byte


@gluon.jit(do_not_specialize=["N"])
def token_kernel(
    x_ptr, norm_ptr, hi_ptr, lo_ptr, sw_ptr, bias_ptr, residual_ptr, y_ptr, N, K, HI_WORDS, LO_WORDS, G, epsilon,
    LEVELS: gl.constexpr, TAIL: gl.constexpr, BN: gl.constexpr, GB: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr, GATED: gl.constexpr, NORM: gl.constexpr, ASM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As :func:`.triton_token.group_kernel`."""
    WARPS: gl.constexpr = gl.num_warps()
    CHANNELS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])  # [GB, 32, 4]
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])  # [BN, GB, 32]
    PARTS: gl.constexpr = gl.SliceLayout(2, WORDS)  # [BN, GB]
    TOKEN: gl.constexpr = gl.SliceLayout(0, WORDS)  # [GB, 32]
    SUMS: gl.constexpr = gl.BlockedLayout([1, GB], [32, 1], [WARPS, 1], [1, 0])  # [BN, GB], a row's in one thread
    ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    ALL: gl.constexpr = gl.BlockedLayout([GB], [32], [WARPS], [0])
    # Four sums over groups run beside each other: in one, every group waits for the one before it.
    SUMMED: gl.constexpr = GB // min(GB, 4)
    # Each exchange has memory of its own: taking the other's would need a barrier more.
    square_sums = gl.allocate_shared_memory(gl.float32, [GB], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    row_sums = gl.allocate_shared_memory(gl.float32, [BN, GB], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    if PDL:
        gdc_launch_dependents()
    # The weights don't wait for the token.
    first = gl.program_id(0) * BN
    line = gl.minimum(first + gl.arange(0, BN, gl.SliceLayout(1, PARTS)), N - 1).to(gl.int64)[:, None]
    group = gl.arange(0, GB, gl.SliceLayout(0, PARTS))[None, :]
    lane = gl.arange(0, 32, gl.SliceLayout(0, TOKEN))[None, :]
    row = line[:, :, None]
    _, inside, quarter = one.word_places(group[:, :, None], lane[None, :, :], G, K, TAIL)
    hi, lo = hi_ptr + row * HI_WORDS, lo_ptr + row * LO_WORDS
    weights = one.weight_words(hi, lo, group[:, :, None], lane[None, :, :], inside, quarter, ASM)
    weight_scale = gl.load(sw_ptr + line * G + group, mask=(line >= 0) & (group < G), other=0.0).to(gl.float32)
    rows = first + gl.arange(0, BN, ROWS)
    place, inside, byte = _channels(G, K, TAIL, GB, CHANNELS)
    if NORM:
        norm = gl.load(norm_ptr + place, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    bias, residual = one.load_row(bias_ptr, rows, N, BIAS), one.load_row(residual_ptr, rows, N, RESIDUAL)
    x = one.load_token(x_ptr, place, K, inside, GATED)
    if NORM:
        squares = _exchanged(gl.sum(gl.sum(x * x, 2), 1), square_sums, ALL).reshape([SUMMED, GB // SUMMED])
        root = inverse_root(gl.sum(gl.sum(squares, 0), 0), K, epsilon)
        x = one.rounded(x_ptr, x * root * norm.to(gl.float32), ASM)
    scale = one.token_scales(x, LEVELS, ASM)
    codes = gl.convert_layout(one.token_words(x, scale, byte, ASM), TOKEN, assert_trivial=True)
    scale = gl.convert_layout(scale, gl.SliceLayout(0, PARTS), assert_trivial=True)
    part = gl.sum(one.add_products(weights, codes[None, :, :], gl.zeros([BN, GB, 32], gl.int32, WORDS), ASM), 2)
    part = part.to(gl.float32) * (scale[None, :] * weight_scale)
    parts = _exchanged(part, row_sums, SUMS).reshape([BN, SUMMED, GB // SUMMED])
    y = gl.convert_layout(gl.sum(gl.sum(parts, 1), 1), ROWS, assert_trivial=True)
    one.store_row(y_ptr, y * 0.25, bias, residual, rows, N, RESIDUAL)


@gluon.jit
def _head_weights(
    hi_ptr, lo_ptr, sw_ptr, line, group, word, N, K: gl.constexpr, HI_WORDS: gl.constexpr, LO_WORDS: gl.constexpr,
    G: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The planes' words of a block of rows, ``[BN, GB, 8]`` each (a word of a slice holds four codes of each of the
    nibble plane's halves), and the scales ``[BN, GB]``; 0 where there is no such row, group or word.
    """
    quarter = 8
    if TAIL:
        quarter = gl.where(group[:, :, None] * 128 + 128 <= K, 8, TAIL // 16)
    row = line.to(gl.int64)
    real = (line < N) & (group < G)
    inside = real[:, :, None] & (word < quarter)
    hi = hi_ptr + row[:, :, None] * HI_WORDS + (group[:, :, None] * 16 + word)
    lo = lo_ptr + row[:, :, None] * LO_WORDS + (group[:, :, None] * 8 + word)
    first, second = gl.load(hi, mask=inside, other=0), gl.load(hi + quarter, mask=inside, other=0)
    return first, second, gl.load(lo, mask=inside, other=0), gl.load(sw_ptr + row * G + group, mask=real, other=0.0)


@gluon.jit(do_not_specialize=["N"])
def head_kernel(
    x_ptr, norm_ptr, hi_ptr, lo_ptr, sw_ptr, bias_ptr, residual_ptr, y_ptr, N, K: gl.constexpr, HI_WORDS: gl.constexpr,
    LO_WORDS: gl.constexpr, G: gl.constexpr, epsilon,
    LEVELS: gl.constexpr, TAIL: gl.constexpr, BN: gl.constexpr, GB: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr, GATED: gl.constexpr, NORM: gl.constexpr, ASM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As :func:`.triton_token.group_kernel`; programs take every ``num_programs``-th block of BN rows.

    A row's sizes are constants: addresses and masks of its words would be half of what a block computes.
    """
    WARPS: gl.constexpr = gl.num_warps()
    CHANNELS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])  # [GB, 32, 4]
    WORDS: gl.constexpr = gl.BlockedLayout([1, GB, 1], [4, 1, 8], [WARPS, 1, 1], [2, 1, 0])  # [BN, GB, 8]
    PARTS: gl.constexpr = gl.SliceLayout(2, WORDS)  # [BN, GB]
    ROWS: gl.constexpr = gl.SliceLayout(1, PARTS)
    ALL: gl.constexpr = gl.BlockedLayout([GB], [32], [WARPS], [0])
    square_sums = gl.allocate_shared_memory(gl.float32, [GB], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    token_scale = gl.allocate_shared_memory(gl.float32, [GB], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    token = gl.allocate_shared_memory(gl.int32, [4 * GB, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    if PDL:
        gdc_launch_dependents()
    # The weights don't wait for the token.
    start, step = gl.program_id(0) * BN, gl.num_programs(0) * BN
    line = gl.arange(0, BN, gl.SliceLayout(1, PARTS))[:, None]
    group = gl.arange(0, GB, gl.SliceLayout(0, PARTS))[None, :]
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    high, higher, low, weight_scale = _head_weights(
        hi_ptr, lo_ptr, sw_ptr, start + line, group, word, N, K, HI_WORDS, LO_WORDS, G, TAIL
    )
    place, inside, byte = _channels(G, K, TAIL, GB, CHANNELS)
    if NORM:
        norm = gl.load(norm_ptr + place, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    x = one.load_token(x_ptr, place, K, inside, GATED)
    if NORM:
        squares = _exchanged(gl.sum(gl.sum(x * x, 2), 1), square_sums, ALL)
        root = inverse_root(gl.sum(squares, 0), K, epsilon)
        x = one.rounded(x_ptr, x * root * norm.to(gl.float32), ASM)
    scale = one.token_scales(x, LEVELS, ASM)
    codes = one.token_words(x, scale, byte, ASM)
    scale = _exchanged(scale, token_scale, gl.SliceLayout(0, PARTS))[None, :]
    token.store(codes.reshape([GB, 4, 8]).permute(1, 0, 2).reshape([4 * GB, 8]))
    a0 = token.slice(0, GB, 0).load(gl.SliceLayout(0, WORDS))
    a1 = token.slice(GB, GB, 0).load(gl.SliceLayout(0, WORDS))
    a2 = token.slice(2 * GB, GB, 0).load(gl.SliceLayout(0, WORDS))
    a3 = token.slice(3 * GB, GB, 0).load(gl.SliceLayout(0, WORDS))
    for first in range(start, N, step):
        next_high, next_higher, next_low, next_scale = _head_weights(
            hi_ptr, lo_ptr, sw_ptr, first + step + line, group, word, N, K, HI_WORDS, LO_WORDS, G, TAIL
        )
        rows = first + gl.arange(0, BN, ROWS)
        bias, residual = one.load_row(bias_ptr, rows, N, BIAS), one.load_row(residual_ptr, rows, N, RESIDUAL)
        w0, w1 = unpack_pair(high, low, False, ASM)
        w2, w3 = unpack_pair(higher, low, True, ASM)
        part = one.add_products(w0, a0[None, :, :], gl.zeros([BN, GB, 8], gl.int32, WORDS), ASM)
        part = one.add_products(w1, a1[None, :, :], part, ASM)
        part = one.add_products(w2, a2[None, :, :], part, ASM)
        part = gl.sum(one.add_products(w3, a3[None, :, :], part, ASM), 2)
        y = gl.sum(part.to(gl.float32) * (scale * weight_scale.to(gl.float32)), 1)
        one.store_row(y_ptr, y * 0.25, bias, residual, rows, N, RESIDUAL)
        high, higher, low, weight_scale = next_high, next_higher, next_low, next_scale
