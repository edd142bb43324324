# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels of ``int6_linear`` for one token; :mod:`.triton` launches them and says which is for what.

On Hopper they are chained (:func:`..triton_device.chained`): weights are read before the kernel in front has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_kernels import gated, inverse_root
from .unpack_ptx import UNPACK_SLICE, dot_bytes, dot_half

_ASM_HALF_GROUP: tl.constexpr = tl.constexpr(dot_half(32))
_ASM_HALF_TAIL: tl.constexpr = tl.constexpr(dot_half(16))
_ASM_SLICE: tl.constexpr = tl.constexpr(UNPACK_SLICE)
_ASM_BYTES: tl.constexpr = tl.constexpr(dot_bytes())


@triton.jit
def load_row(pointer, rows, N, GIVEN: tl.constexpr):
    """What is added to one token's outputs: read before the sums, which don't wait for it."""
    if GIVEN:
        return tl.load(pointer + rows, mask=rows < N, other=0.0).to(tl.float32)
    else:
        return rows * 0.0


@triton.jit
def store_row(y_ptr, y, bias, residual, rows, N, RESIDUAL: tl.constexpr):
    """One token's outputs, rounded; what is added to them rounds once more."""
    y += bias
    if RESIDUAL:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) + residual
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def _signed_byte(word, index: tl.constexpr):
    return (word << (24 - 8 * index)) >> 24


@triton.jit
def _dot_words(hi, lo, a, inside, WORDS: tl.constexpr, STRIDE: tl.constexpr):
    """``Σ 4·c·a`` over 16·WORDS weights in plain Triton; pointers to 32-bit words, slices STRIDE words long."""
    total = tl.zeros_like(tl.load(lo, mask=inside, other=0))
    for word in tl.static_range(WORDS):
        two = tl.load(lo + word, mask=inside, other=0)
        h0 = tl.load(hi + word, mask=inside, other=0)
        h1 = tl.load(hi + STRIDE + word, mask=inside, other=0)
        for index in tl.static_range(4):
            codes = tl.load(a + index * STRIDE + word, mask=inside, other=0)
            h = h0 if index < 2 else h1
            for byte in tl.static_range(4):
                nibble = h >> 8 * byte + 4 * (index % 2) & 15
                c4 = (nibble << 4 | (two >> 8 * byte + 2 * index & 3) << 2) - 128
                total += c4 * _signed_byte(codes, byte)
    return total


@triton.jit(do_not_specialize=["N"])
def vector_kernel(
    a_ptr, sa_ptr, hi_ptr, lo_ptr, sw_ptr, bias_ptr, residual_ptr, y_ptr, N, HI_WORDS, LO_WORDS, G, FULL,
    TAIL: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token. A tile is BN rows by HALVES half groups (64 weights each); pointers are to 32-bit words.

    A thread reads a half group as three 16-byte loads of the planes and four of the activation codes.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)[:, None]  # rows past the end read the last one and are never stored
    half = tl.arange(0, HALVES)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    bias, residual = load_row(bias_ptr, rows, N, BIAS), load_row(residual_ptr, rows, N, RESIDUAL)
    hi_row, lo_row, sw_row = hi_ptr + row * HI_WORDS, lo_ptr + row * LO_WORDS, sw_ptr + row * G
    acc = tl.zeros([BN, HALVES], tl.float32)
    for start in range(0, FULL * 2, HALVES):
        inside = start + half < FULL * 2
        index = tl.minimum(start + half, FULL * 2 - 1)
        group, word = index // 2, (index % 2) * 4
        hi, lo, a = hi_row + (group * 16 + word), lo_row + index * 4, a_ptr + (group * 32 + word) + row * 0
        if ASM:
            part = tl.inline_asm_elementwise(
                _ASM_HALF_GROUP, "=r,l,l,l", [hi.to(tl.int64), lo.to(tl.int64), a.to(tl.int64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            part = _dot_words(hi, lo, a, inside & (row >= 0), 4, 8)
        scale = tl.load(sa_ptr + group, mask=inside, other=0.0) * tl.load(sw_row + group).to(tl.float32)
        # Halves past the end have read a half that counts already: leave them out (0·NaN would not).
        acc += tl.where(inside, part.to(tl.float32) * scale, 0.0)
    y = tl.sum(acc, axis=1)
    if TAIL:  # a partial last group: four slices of TAIL/4 codes
        last = rows * 0 + FULL
        row = tl.minimum(rows, N - 1).to(tl.int64)
        hi, lo = hi_ptr + row * HI_WORDS + last * 16, lo_ptr + row * LO_WORDS + last * 8
        a = a_ptr + last * 32
        if ASM:  # TAIL is 64: one half group
            part = tl.inline_asm_elementwise(
                _ASM_HALF_TAIL, "=r,l,l,l", [hi.to(tl.int64), lo.to(tl.int64), a.to(tl.int64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            part = _dot_words(hi, lo, a, rows >= 0, TAIL // 16, TAIL // 16)
        y += part.to(tl.float32) * (tl.load(sa_ptr + last) * tl.load(sw_ptr + row * G + last).to(tl.float32))
    store_row(y_ptr, y * 0.25, bias, residual, rows, N, RESIDUAL)


@triton.jit
def load_token(x_ptr, place, K, inside, GATED: tl.constexpr):
    """A slice of each group."""
    if GATED:
        return gated(x_ptr, place, K, inside)
    else:
        return tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_products(weight, codes, total, ASM: tl.constexpr):
    """``total + Σ weight·code`` over the four bytes of each word."""
    if ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weight, codes, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for byte in tl.static_range(4):
            total += _signed_byte(weight, byte) * _signed_byte(codes, byte)
    return total


@triton.jit
def word_places(group, lane, G, K, TAIL: tl.constexpr):
    """A group is 32 words of four channels, one for each lane of a warp, slice after slice: the first channel of a
    lane's word, whether there is such a word, and the words of a slice of its group.
    """
    quarter = 8
    if TAIL:
        quarter = tl.where(group * 128 + 128 <= K, 8, TAIL // 16)
    return group * 128 + (lane // 8 * quarter + lane % 8) * 4, (group < G) & (lane % 8 < quarter), quarter


@triton.jit
def weight_words(hi, lo, group, lane, inside, quarter, ASM: tl.constexpr):
    """``4·c`` of the four weights of each lane's word; ``hi`` and ``lo`` point to a row's planes."""
    word, part = lane % 8, lane // 8
    nibbles = tl.load(hi + (group * 16 + part // 2 * quarter + word), mask=inside, other=0)
    bits = tl.load(lo + (group * 8 + word), mask=inside, other=0)
    # Masked weights are −32; the masked activations beside them are 0.
    if ASM:
        return tl.inline_asm_elementwise(
            _ASM_SLICE, "=r,r,r,r,r", [nibbles, bits, 4 - part % 2 * 4, part * 2 - 2],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        HIGH: tl.constexpr = -252645136  # 0xF0F0F0F0
        LOW: tl.constexpr = 202116108  # 0x0C0C0C0C
        SIGNS: tl.constexpr = -2139062144  # 0x80808080
        return (nibbles << (4 - part % 2 * 4) & HIGH | bits >> part * 2 << 2 & LOW) ^ SIGNS


@triton.jit
def rounded(x_ptr, x, ASM: tl.constexpr):
    """``x``, rounded to the row's type."""
    if ASM and x_ptr.dtype.element_ty == tl.bfloat16:
        # Two at a time: the compiler's conversions of one run in the pipe of the special functions, at a quarter of
        # the speed.
        narrow = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
        return narrow.to(tl.float32)
    else:
        return x.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def token_scales(x, LEVELS: tl.constexpr, ASM: tl.constexpr):
    """The scale of each group of ``x [GB, 32, 4]``; NaN where a channel is NaN or infinite."""
    # Without their sign, floats are ordered as integers are, and NaN comes last: a warp finds that in one instruction.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.max(tl.max(bits, 2), 1).to(tl.float32, bitcast=True)
    scale = quotient(most, 1.0 * LEVELS, 1.0 / LEVELS, ASM)
    return tl.where(most < float("inf"), scale, float("nan"))


@triton.jit
def quotient(x, divisor, inverse, ASM: tl.constexpr):
    """``x / divisor``, correctly rounded; ``inverse`` is 1 / divisor.

    These are the steps of the division that the compiler would write, but for its branch, which is taken around numbers
    so small or large that a step overflows or loses digits: there are none here.
    """
    if ASM:
        minus, ratio = -divisor, x * inverse
        ratio = tl.fma(tl.fma(ratio, minus, x), inverse, ratio)
        return tl.fma(tl.fma(ratio, minus, x), inverse, ratio)
    else:
        return tl.div_rn(x, divisor)


@triton.jit
def token_words(x, scale, byte, ASM: tl.constexpr):
    """Codes of ``x [GB, 32, 4]``, four to a word."""
    # Powers of two cost no digit: the inverse of the smallest scales would overflow.
    lift = tl.where(scale < 5.421010862427522e-20, 18446744073709551616.0, 1.0)  # 2^-64, 2^64
    divisor = tl.where(scale == 0.0, 1.0, scale * lift)
    inverse = divisor
    if ASM:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
        inverse = tl.fma(inverse, tl.fma(-divisor, inverse, 1.0), inverse)
    ratio = quotient(x * lift[:, None, None], divisor[:, None, None], inverse[:, None, None], ASM)
    # Adding 1.5·2^23 rounds a float32 of this size to the nearest integer, ties to even, and leaves it in the lowest
    # bits. 128 more keeps these positive, so that bytes don't borrow from each other.
    biased = (ratio + 12583040.0).to(tl.int32, bitcast=True)
    return (tl.sum(biased - 1262485504 << 8 * byte, 2)) ^ -2139062144  # 0x4B400000; 0x80808080


@triton.jit(do_not_specialize=["N"])
def group_kernel(
    x_ptr, norm_ptr, hi_ptr, lo_ptr, sw_ptr, bias_ptr, residual_ptr, y_ptr, N, K, HI_WORDS, LO_WORDS, G, epsilon,
    LEVELS: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of at most GB groups by BN rows; every program quantizes the token itself, which saves a launch, and
    what NORM and GATED (see :func:`quantize_kernel`) put before that another one. Planes are read as 32-bit words.

    A warp holds whole groups: their maximum and a row's sum over them need no other warp, and its codes are multiplied
    where they were made.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    line = tl.minimum(rows, N - 1).to(tl.int64)  # rows past the end read the last one and are never stored
    flat = tl.arange(0, GB)
    if PDL:
        gdc_launch_dependents()
    # The weights don't wait for the token.
    row, group, lane = line[:, None, None], flat[None, :, None], tl.arange(0, 32)[None, None, :]
    _, inside, quarter = word_places(group, lane, G, K, TAIL)
    weights = weight_words(hi_ptr + row * HI_WORDS, lo_ptr + row * LO_WORDS, group, lane, inside, quarter, ASM)
    weight_scale = sw_ptr + line[:, None] * G + flat[None, :]
    weight_scale = tl.load(weight_scale, mask=(flat < G)[None, :] & (line >= 0)[:, None], other=0.0).to(tl.float32)
    byte = tl.arange(0, 4)[None, None, :]
    place, inside, _ = word_places(flat[:, None, None], tl.arange(0, 32)[None, :, None], G, K, TAIL)
    place, inside = place + byte, inside & (byte >= 0)
    if NORM:
        norm = tl.load(norm_ptr + place, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    bias, residual = load_row(bias_ptr, rows, N, BIAS), load_row(residual_ptr, rows, N, RESIDUAL)
    x = load_token(x_ptr, place, K, inside, GATED)
    if NORM:
        square = tl.sum(tl.sum(x * x, 2), 1)
        x = x * inverse_root(tl.sum(square, 0), K, epsilon) * norm.to(tl.float32)
        x = rounded(x_ptr, x, ASM)
    scale = token_scales(x, LEVELS, ASM)
    codes = token_words(x, scale, byte, ASM)
    part = tl.sum(add_products(weights, codes[None, :, :], tl.zeros([BN, GB, 32], tl.int32), ASM), 2)
    y = tl.sum(part.to(tl.float32) * (scale[None, :] * weight_scale), axis=1)
    store_row(y_ptr, y * 0.25, bias, residual, rows, N, RESIDUAL)


@triton.jit(do_not_specialize=["N"])
def vector_bytes_kernel(
    a_ptr, sa_ptr, w_ptr, sw_ptr, bias_ptr, y_ptr, N, WORDS, G, COUNT,
    BN: tl.constexpr, HALVES: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, eight-bit weights of COUNT half groups a row; tiles and pointers as :func:`vector_kernel`'s.

    Two threads take a group's pieces of 16 bytes in turn, so that each load of theirs fills sectors of 32.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)[:, None]
    half = tl.arange(0, HALVES)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    bias = load_row(bias_ptr, rows, N, BIAS)
    acc = tl.zeros([BN, HALVES], tl.float32)
    for start in range(0, COUNT, HALVES):
        inside = start + half < COUNT
        index = tl.minimum(start + half, COUNT - 1)
        place = index // 2 * 32 + index % 2 * 4
        step = tl.where(index // 2 * 2 + 1 < COUNT, 8, 4)  # a row's last half group may be alone
        w, a = w_ptr + row * WORDS + place, a_ptr + place + row * 0
        if ASM:
            part = tl.inline_asm_elementwise(
                _ASM_BYTES, "=r,l,l,l", [w.to(tl.int64), a.to(tl.int64), step.to(tl.int64) * 4 + row * 0],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            part = tl.zeros([BN, HALVES], tl.int32)
            for word in tl.static_range(16):
                offset = word // 4 * step + word % 4
                part = add_products(tl.load(w + offset), tl.load(a + offset), part, False)
        scale = tl.load(sa_ptr + index // 2) * tl.load(sw_ptr + row * G + index // 2).to(tl.float32)
        acc += tl.where(inside, part.to(tl.float32) * scale, 0.0)
    store_row(y_ptr, tl.sum(acc, axis=1), bias, bias, rows, N, False)
