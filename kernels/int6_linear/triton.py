# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels of ``int6_linear`` for NVIDIA GPUs; same signature and shapes as :mod:`.reference`.

Three paths, by the number of tokens M; all quantize the activations first (one small kernel) and multiply integers:

* M = 1: every thread unpacks whole 32-bit words of the planes and multiplies with ``dp4a``; nothing but packed weights
  crosses the memory bus (0.77 bytes per weight).
* M up to ``_SMALL_M``: the same planes feed int8 tensor-core products of four 32-wide slices per group, weights first.
* larger M: the planes are unpacked once into an int8 scratch matrix, then one int8 product per group of 128.

Unpacking leaves each code in the top six bits of its byte (``4·c``), so the sign needs no work; the ¼ is applied to the
result, exactly. Sums inside a group are exact integers; groups are added in float32.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import LEVELS
from .pack import group_count

# The interpreter has no inline assembly; there the kernels use the same arithmetic spelled with Triton's operators.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_SMALL_M = 256
_GROUP = 128

_UNPACK_FIRST = """
{ .reg .b32 t, u;
  shl.b32 t, $2, 4;
  lop3.b32 t, t, 0xF0F0F0F0, 0x80808080, 0x6A;
  shl.b32 u, $3, 2;
  lop3.b32 $0, u, 0x0C0C0C0C, t, 0xEA;
  lop3.b32 t, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
  lop3.b32 $1, $3, 0x0C0C0C0C, t, 0xEA; }
"""
_UNPACK_SECOND = """
{ .reg .b32 t, u;
  shl.b32 t, $2, 4;
  lop3.b32 t, t, 0xF0F0F0F0, 0x80808080, 0x6A;
  shr.u32 u, $3, 2;
  lop3.b32 $0, u, 0x0C0C0C0C, t, 0xEA;
  lop3.b32 t, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
  shr.u32 u, $3, 4;
  lop3.b32 $1, u, 0x0C0C0C0C, t, 0xEA; }
"""


def _dot_half(stride: int) -> str:
    """PTX for ``Σ 4·c·a`` over 64 weights: 16 bytes of each slice of a group whose slices are ``stride`` bytes long.

    Operands: $0 the int32 sum, $1 and $2 addresses in the nibble and the two-bit plane, $3 of the activation codes.
    """
    lines = [".reg .b32 lo<4>, hi<4>, a<4>, t, u, sum;", "mov.b32 sum, 0;", _load("lo", "$2", 0, stream=True)]
    for index in range(4):
        odd = index % 2
        if not odd:
            lines.append(_load("hi", "$1", index // 2 * stride, stream=True))
        lines.append(_load("a", "$3", index * stride, stream=False))
        for word in range(4):
            nibble, bits = f"hi{word}", f"lo{word}"
            if not odd:
                lines.append(f"shl.b32 t, {nibble}, 4;")
                nibble = "t"
            if index != 1:  # slice 1 has its two bits where they belong
                shift = ("shl.b32", 2) if index == 0 else ("shr.u32", 2 * index - 2)
                lines.append(f"{shift[0]} u, {bits}, {shift[1]};")
                bits = "u"
            lines += [
                f"lop3.b32 t, {nibble}, 0xF0F0F0F0, 0x80808080, 0x6A;",
                f"lop3.b32 t, {bits}, 0x0C0C0C0C, t, 0xEA;",
                f"dp4a.s32.s32 sum, t, a{word}, sum;",
            ]
    return "{ " + " ".join(lines) + " mov.b32 $0, sum; }"


def _load(name: str, address: str, offset: int, *, stream: bool) -> str:
    """A 16-byte load; ``stream`` keeps weights, which are read once, from displacing activations in the L1 cache."""
    hint = ".L1::no_allocate" if stream else ""
    registers = ", ".join(f"{name}{word}" for word in range(4))
    return f"ld.global.nc{hint}.v4.b32 {{{registers}}}, [{address} + {offset}];"


_ASM_HALF_GROUP: tl.constexpr = tl.constexpr(_dot_half(32))
_ASM_HALF_TAIL: tl.constexpr = tl.constexpr(_dot_half(16))
_ASM_FIRST: tl.constexpr = tl.constexpr(_UNPACK_FIRST)
_ASM_SECOND: tl.constexpr = tl.constexpr(_UNPACK_SECOND)


@triton.jit
def _quantize_kernel(x_ptr, codes_ptr, scale_ptr, K, K_PAD, G, LEVELS: tl.constexpr, GB: tl.constexpr):
    """Dynamic symmetric codes of GB groups of one token; columns past K are written as 0."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GB + tl.arange(0, GB)
    k = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), axis=1)
    scale = tl.div_rn(absmax, tl.full([GB], LEVELS, tl.float32))
    ratio = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)[:, None])
    # Adding and subtracting 1.5·2^23 rounds a float32 of this size to the nearest integer, ties to even.
    codes = tl.where(scale[:, None] == 0.0, 0.0, (ratio + 12582912.0) - 12582912.0)
    # max() drops NaN: a group that holds one gets a NaN scale, so that its tokens come out as NaN.
    has_nan = tl.max((x != x).to(tl.int32), axis=1)
    scale = tl.where(has_nan != 0, float("nan"), scale)
    tl.store(codes_ptr + token * K_PAD + k, codes.to(tl.int8), mask=k < K_PAD)
    tl.store(scale_ptr + token * G + group, scale, mask=group < G)


@triton.jit
def _unpack_pair(hi, lo, SECOND: tl.constexpr, ASM: tl.constexpr):
    """Two slices of ``4·c`` (int8) from one half of the nibble plane and the two-bit plane, both uint8."""
    if ASM:
        if SECOND:
            even, odd = tl.inline_asm_elementwise(
                _ASM_SECOND, "=&r,=&r,r,r", [hi, lo], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
        else:
            even, odd = tl.inline_asm_elementwise(
                _ASM_FIRST, "=&r,=&r,r,r", [hi, lo], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
    else:
        h = hi.to(tl.int32)
        bits = lo.to(tl.int32) >> (4 if SECOND else 0)
        even = (((h & 15) << 4 | (bits & 3) << 2) - 128).to(tl.int8)
        odd = (((h >> 4) << 4 | (bits >> 2 & 3) << 2) - 128).to(tl.int8)
    return even, odd


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
def _vector_kernel(
    a_ptr, sa_ptr, hi_ptr, lo_ptr, sw_ptr, bias_ptr, y_ptr, N, HI_WORDS, LO_WORDS, G, FULL,
    TAIL: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One token. A tile is BN rows by HALVES half groups (64 weights each); pointers are to 32-bit words.

    A thread reads a half group as three 16-byte loads of the planes and four of the activation codes.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)[:, None]  # rows past the end read the last one and are never stored
    half = tl.arange(0, HALVES)[None, :]
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
                dtype=tl.int32, is_pure=True, pack=1,
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
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            part = _dot_words(hi, lo, a, rows >= 0, TAIL // 16, TAIL // 16)
        y += part.to(tl.float32) * (tl.load(sa_ptr + last) * tl.load(sw_ptr + row * G + last).to(tl.float32))
    y *= 0.25
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=rows < N)


@triton.jit(do_not_specialize=["M", "N"])
def _small_kernel(
    a_ptr, sa_ptr, hi_ptr, lo_ptr, sw_ptr, bias_ptr, y_ptr, M, N, K_PAD, HI_BYTES, LO_BYTES, G, FULL,
    TAIL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BN weight rows by BM tokens; each group is four products of 32-wide slices, weights as the first operand.

    With SPLIT > 1 the groups are shared out over the third grid axis, and ``y`` is float32 ``[SPLIT, M, N]``.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.minimum(rows, N - 1).to(tl.int64)  # rows past the end read the last one and are never stored
    token = tl.minimum(tokens, M - 1).to(tl.int64)
    k = tl.arange(0, 32)
    hi = hi_ptr + row[:, None] * HI_BYTES + k[None, :]
    lo = lo_ptr + row[:, None] * LO_BYTES + k[None, :]
    a = a_ptr + token[None, :] * K_PAD + k[:, None]
    sw = sw_ptr + row * G
    sa = sa_ptr + token * G
    acc = tl.zeros([BN, BM], tl.float32)
    share = tl.cdiv(FULL, SPLIT)
    part_index = tl.program_id(2)
    for group in tl.range(part_index * share, tl.minimum(part_index * share + share, FULL), num_stages=STAGES):
        two = tl.load(lo + group * 32)
        w0, w1 = _unpack_pair(tl.load(hi + group * 64), two, False, ASM)
        w2, w3 = _unpack_pair(tl.load(hi + group * 64 + 32), two, True, ASM)
        slices = a + group * 128
        part = tl.dot(w0, tl.load(slices), out_dtype=tl.int32)
        part = tl.dot(w1, tl.load(slices + 32), part, out_dtype=tl.int32)
        part = tl.dot(w2, tl.load(slices + 64), part, out_dtype=tl.int32)
        part = tl.dot(w3, tl.load(slices + 96), part, out_dtype=tl.int32)
        scale = tl.load(sw + group).to(tl.float32)[:, None] * tl.load(sa + group)[None, :]
        acc += part.to(tl.float32) * scale
    if TAIL and part_index == SPLIT - 1:
        QUARTER: tl.constexpr = TAIL // 4
        within = k < QUARTER
        two = tl.load(lo + FULL * 32, mask=within[None, :], other=0)
        w0, w1 = _unpack_pair(tl.load(hi + FULL * 64, mask=within[None, :], other=0), two, False, ASM)
        w2, w3 = _unpack_pair(tl.load(hi + FULL * 64 + QUARTER, mask=within[None, :], other=0), two, True, ASM)
        slices = a + FULL * 128
        # Masked weights unpack to −32; the masked activations beside them are 0.
        part = tl.dot(w0, tl.load(slices, mask=within[:, None], other=0), out_dtype=tl.int32)
        part = tl.dot(w1, tl.load(slices + QUARTER, mask=within[:, None], other=0), part, out_dtype=tl.int32)
        part = tl.dot(w2, tl.load(slices + 2 * QUARTER, mask=within[:, None], other=0), part, out_dtype=tl.int32)
        part = tl.dot(w3, tl.load(slices + 3 * QUARTER, mask=within[:, None], other=0), part, out_dtype=tl.int32)
        scale = tl.load(sw + FULL).to(tl.float32)[:, None] * tl.load(sa + FULL)[None, :]
        acc += part.to(tl.float32) * scale
    if SPLIT == 1:
        acc *= 0.25
        if BIAS:
            acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    out = y_ptr + (part_index.to(tl.int64) * M + tokens)[None, :] * N + rows[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])


@triton.jit(do_not_specialize=["M", "N"])
def _reduce_kernel(parts_ptr, bias_ptr, y_ptr, M, N, SPLIT: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr):
    """Adds the SPLIT partial results of one token, always in the same order."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64)
    acc = tl.zeros([BN], tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + (part * M + token) * N + rows, mask=rows < N, other=0.0)
    acc *= 0.25
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * N + rows, acc.to(y_ptr.dtype.element_ty), mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def _unpack_kernel(
    hi_ptr, lo_ptr, out_ptr, N, HI_BYTES, LO_BYTES, K_PAD, FULL,
    TAIL: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One group of BN rows from the planes to ``4·c`` int8 ``[N, K_PAD]``; codes past K are written as 0."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    group = tl.program_id(1)
    k = tl.arange(0, 32)[None, :]
    row = rows.to(tl.int64)[:, None]
    quarter = 32
    if TAIL and group == FULL:
        quarter = TAIL // 4
    mask = (rows < N)[:, None] & (k < quarter)
    hi = hi_ptr + row * HI_BYTES + group * 64 + k
    two = tl.load(lo_ptr + row * LO_BYTES + group * 32 + k, mask=mask, other=0)
    w0, w1 = _unpack_pair(tl.load(hi, mask=mask, other=0), two, False, ASM)
    w2, w3 = _unpack_pair(tl.load(hi + quarter, mask=mask, other=0), two, True, ASM)
    out = out_ptr + row * K_PAD + group * 128 + k
    tl.store(out, w0, mask=mask)
    tl.store(out + quarter, w1, mask=mask)
    tl.store(out + 2 * quarter, w2, mask=mask)
    tl.store(out + 3 * quarter, w3, mask=mask)
    if TAIL and group == FULL:
        wide = tl.arange(0, 128)[None, :]
        padding = (rows < N)[:, None] & (wide >= TAIL)
        tl.store(out_ptr + row * K_PAD + group * 128 + wide, tl.zeros([BN, 128], tl.int8), mask=padding)


@triton.jit(do_not_specialize=["M", "N"])
def _large_kernel(
    a_ptr, sa_ptr, w_ptr, sw_ptr, bias_ptr, y_ptr, M, N, K_PAD, G,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """BM tokens by BN rows of unpacked weights; one int8 product of depth 128 per group, scaled into float32.

    Scales are float32 and group-major here: ``[G, M]`` and ``[G, N]``.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # Programs of a band of BAND token tiles walk the weight tiles together, so that both stay in the L2 cache.
    index, per_band = tl.program_id(0), BAND * tiles_n
    band = index // per_band
    height = tl.minimum(tiles_m - band * BAND, BAND)
    tokens = (band * BAND + (index % per_band) % height) * BM + tl.arange(0, BM)
    rows = ((index % per_band) // height) * BN + tl.arange(0, BN)
    row, token = tl.minimum(rows, N - 1).to(tl.int64), tl.minimum(tokens, M - 1).to(tl.int64)
    k = tl.arange(0, 128)
    a = a_ptr + token[:, None] * K_PAD + k[None, :]
    w = w_ptr + row[None, :] * K_PAD + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    sa, sw = sa_ptr + token, sw_ptr + row
    # Scales are read one group ahead: they feed no product, so nothing else hides their latency.
    next_sa, next_sw = tl.load(sa), tl.load(sw)
    for group in tl.range(0, G, num_stages=STAGES):
        this_sa, this_sw = next_sa, next_sw
        ahead = tl.minimum(group + 1, G - 1)
        next_sa, next_sw = tl.load(sa + ahead * M), tl.load(sw + ahead * N)
        part = tl.dot(tl.load(a + group * 128), tl.load(w + group * 128), out_dtype=tl.int32)
        acc += part.to(tl.float32) * (this_sa[:, None] * this_sw[None, :])
    acc *= 0.25
    if BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    out = y_ptr + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < N)[None, :])


def supports(x: Tensor, group_size: int, activation: str) -> bool:
    """Whether the kernels take this call; others are computed by the reference on the same device.

    They need groups of 128, K a multiple of 16 (whole words in every slice of a partial group), quantized activations
    and an input of at most 32 bits.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return narrow and group_size == _GROUP and x.shape[-1] % 16 == 0 and activation in ("a6", "a8")


def int6_linear(
    x: Tensor,
    weight_hi: Tensor,
    weight_lo: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int = _GROUP,
    activation: str = "a8",
) -> Tensor:
    """As :func:`.reference.int6_linear`, for the calls that :func:`supports` accepts."""
    assert supports(x, group_size, activation)
    in_features, rows = x.shape[-1], weight_hi.shape[0]
    y = x.new_empty(*x.shape[:-1], rows)
    tokens = x.numel() // in_features if in_features else 0
    if tokens == 0 or rows == 0:
        return y
    planes = (weight_hi.contiguous(), weight_lo.contiguous(), weight_scale.contiguous())
    codes, scale = quantize_activation(x.reshape(tokens, in_features).contiguous(), activation)
    if tokens == 1:
        _vector(codes, scale, planes, bias, y, in_features)
    elif tokens <= _SMALL_M:
        _small(codes, scale, planes, bias, y, in_features, tokens)
    else:
        _large(codes, scale, planes, bias, y, in_features, tokens)
    return y


def quantize_activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[M, 128·ceil(K/128)]`` and float32 scales ``[M, ceil(K/128)]`` of ``x [M, K]``, contiguous."""
    tokens, in_features = x.shape
    groups = group_count(in_features, _GROUP)
    codes = torch.empty(tokens, groups * _GROUP, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    per_program = 8 if groups > 4 else 4
    levels = LEVELS[int(activation[1:])]
    _quantize_kernel[(tokens, triton.cdiv(groups, per_program))](
        x, codes, scale, in_features, groups * _GROUP, groups, LEVELS=levels, GB=per_program, num_warps=4
    )  # fmt: skip
    return codes, scale


# Tiles by rule, from a sweep on one H200 (benchmarks/int6_linear.py --sweep); no autotuning, so a first call is quick.
def vector_config(in_features: int) -> dict[str, int]:
    """Tile of the one-token kernel."""
    return {"BN": 2, "HALVES": 64, "num_warps": 4 if in_features >= 8192 else 2}


def small_config(tokens: int, rows: int, in_features: int) -> dict[str, int]:
    """Tile of the few-token kernel; the groups are split until there are a few programs for every multiprocessor."""
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    programs = triton.cdiv(rows, 64) * triton.cdiv(tokens, block_m)
    split = 1
    while split < 8 and programs * split < 400 and in_features // _GROUP >= 8 * split:
        split *= 2
    return {"BM": block_m, "BN": 64, "STAGES": 3, "SPLIT": split, "num_warps": 4}


def large_config() -> dict[str, int]:
    """Tile of the many-token kernel."""
    return {"BM": 64, "BN": 128, "STAGES": 3, "BAND": 8, "num_warps": 4}


Planes = tuple[Tensor, Tensor, Tensor]


def _vector(
    codes: Tensor, scale: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, in_features: int,
    config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    hi, lo, weight_scale = planes
    rows, full = hi.shape[0], in_features // _GROUP
    options: dict[str, Any] = config or vector_config(in_features)
    # The assembly reads 16 bytes at a time: every row of both planes must start on such a boundary.
    aligned = in_features % 64 == 0 and not INTERPRET and hi.data_ptr() % 16 == lo.data_ptr() % 16 == 0
    _vector_kernel[(triton.cdiv(rows, options["BN"]),)](
        codes.view(torch.int32), scale, hi.view(torch.int32), lo.view(torch.int32), weight_scale, bias, y, rows,
        hi.shape[1] // 4, lo.shape[1] // 4, weight_scale.shape[1], full,
        TAIL=in_features % _GROUP, BIAS=bias is not None, ASM=aligned, **options,
    )  # fmt: skip


def _small(
    codes: Tensor, scale: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, in_features: int, tokens: int,
    config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    hi, lo, weight_scale = planes
    rows, full = hi.shape[0], in_features // _GROUP
    options: dict[str, Any] = config or small_config(tokens, rows, in_features)
    split = options["SPLIT"]
    out = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=y.device)
    _small_kernel[(triton.cdiv(rows, options["BN"]), triton.cdiv(tokens, options["BM"]), split)](
        codes, scale, hi, lo, weight_scale, bias, out, tokens, rows, codes.shape[1], hi.shape[1], lo.shape[1],
        weight_scale.shape[1], full, TAIL=in_features % _GROUP, BIAS=bias is not None, ASM=not INTERPRET, **options,
    )  # fmt: skip
    if split > 1:
        _reduce_kernel[(triton.cdiv(rows, 1024), tokens)](
            out, bias, y, tokens, rows, SPLIT=split, BN=1024, BIAS=bias is not None, num_warps=4
        )


def unpack_to_int8(planes: Planes, in_features: int) -> Tensor:
    """``4·c`` as int8 ``[N, 128·ceil(K/128)]``, zero past K: the scratch matrix of the many-token path."""
    hi, lo, weight_scale = planes
    rows, groups = weight_scale.shape
    out = torch.empty(rows, groups * _GROUP, dtype=torch.int8, device=hi.device)
    _unpack_kernel[(triton.cdiv(rows, 64), groups)](
        hi, lo, out, rows, hi.shape[1], lo.shape[1], out.shape[1], in_features // _GROUP,
        TAIL=in_features % _GROUP, BN=64, ASM=not INTERPRET, num_warps=4,
    )  # fmt: skip
    return out


def _large(
    codes: Tensor, scale: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, in_features: int, tokens: int,
    config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    weight_scale = planes[2]
    rows, groups = weight_scale.shape
    weight = unpack_to_int8(planes, in_features)
    scale, weight_scale = scale.t().contiguous(), weight_scale.t().float().contiguous()
    options: dict[str, Any] = config or large_config()
    grid = (triton.cdiv(tokens, options["BM"]) * triton.cdiv(rows, options["BN"]),)
    _large_kernel[grid](
        codes, scale, weight, weight_scale, bias, y, tokens, rows, codes.shape[1], groups, BIAS=bias is not None,
        **options,
    )  # fmt: skip
