# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels of ``int6_linear`` for several tokens, and what quantizes them; :mod:`.triton` launches them and says
which is for what, :mod:`.triton_token` has those for one token.

Unpacking leaves each code in the top six bits of its byte (``4·c``), so the sign needs no work; the ¼ is applied to the
result, exactly. Sums inside a group are exact integers; groups are added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .unpack_ptx import UNPACK_FIRST, UNPACK_SECOND

_ASM_FIRST: tl.constexpr = tl.constexpr(UNPACK_FIRST)
_ASM_SECOND: tl.constexpr = tl.constexpr(UNPACK_SECOND)


@triton.jit
def round_to(x, scale):
    """Codes, as floats: ``x / scale`` to the nearest integer, ties to even; 0 where the scale is 0."""
    ratio = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    # Adding and subtracting 1.5·2^23 rounds a float32 of this size to the nearest integer, ties to even.
    return tl.where(scale == 0.0, 0.0, (ratio + 12582912.0) - 12582912.0)


@triton.jit
def gated(x_ptr, place, K, inside):
    """``silu(gate) · up`` of a row ``[gate | up]``, rounded where the two ops would round."""
    gate = tl.load(x_ptr + place, mask=inside, other=0.0)
    up = tl.load(x_ptr + K + place, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (silu * up).to(gate.dtype).to(tl.float32)


@triton.jit
def normed(x_ptr, x, root, weight):
    """``x · root · weight``, rounded to the row's type."""
    return (x * root * weight.to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def inverse_root(total, K, epsilon):
    """1/√(mean + ε) of a row whose squares sum up to ``total``."""
    return 1.0 / tl.sqrt_rn(total / K + epsilon)


@triton.jit(do_not_specialize=["M_PAD"])
def quantize_kernel(
    x_ptr, norm_ptr, codes_ptr, scale_ptr, K, K_PAD, G, M_PAD, epsilon,
    LEVELS: tl.constexpr, GB: tl.constexpr, FRAGMENT: tl.constexpr, COLUMNS: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Dynamic symmetric codes of GB groups of one token; columns past K are written as 0.

    With FRAGMENT, codes are stored as :mod:`.gluon` reads them, ``[M_PAD / FRAGMENT, G, FRAGMENT, 128]``: slices of
    a group in the order 0, 2, 1, 3. COLUMNS stores the scales as ``[G, M_PAD]`` instead of ``[M, G]``. GATED: rows
    are ``[gate | up]``, of which ``silu(gate) · up`` is quantized; NORM: their RMS norm is.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GB + tl.arange(0, GB)
    inner = tl.arange(0, 128)[None, :]
    k = group[:, None] * 128 + inner
    if PDL:
        gdc_launch_dependents()
    if NORM:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
    if PDL:
        gdc_wait()
    row = x_ptr + token * K
    if GATED:
        x = gated(row + token * K, k, K, k < K)
    else:
        x = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        square = tl.zeros([1024], tl.float32)
        for start in tl.range(0, K, 1024):
            at = start + tl.arange(0, 1024)
            part = tl.load(row + at, mask=at < K, other=0.0).to(tl.float32)
            square += part * part
        root = inverse_root(tl.sum(square, 0), K, epsilon)
        x = normed(x_ptr, x, root, norm)
    absmax = tl.max(tl.abs(x), axis=1)
    scale = tl.div_rn(absmax, tl.full([GB], LEVELS, tl.float32))
    codes = round_to(x, scale[:, None])
    # max() drops NaN: a group that holds one gets a NaN scale, so that its tokens come out as NaN.
    has_nan = tl.max((x != x).to(tl.int32), axis=1)
    scale = tl.where(has_nan != 0, float("nan"), scale)
    place = token * K_PAD + k
    if FRAGMENT:
        line = (token // FRAGMENT * G + group[:, None]) * FRAGMENT + token % FRAGMENT
        place = line * 128 + inner // 32 % 2 * 64 + inner // 64 * 32 + inner % 32
    tl.store(codes_ptr + place, codes.to(tl.int8), mask=k < K_PAD)
    where = group * M_PAD + token if COLUMNS else token * G + group
    tl.store(scale_ptr + where, scale, mask=group < G)


@triton.jit
def unpack_pair(hi, lo, SECOND: tl.constexpr, ASM: tl.constexpr):
    """Two slices of ``4·c`` from one half of the nibble plane and the two-bit plane: uint8 to int8, a code each, or
    int32 words of four.
    """
    if ASM:
        PACK: tl.constexpr = 1 if hi.dtype == tl.int32 else 4
        if SECOND:
            even, odd = tl.inline_asm_elementwise(
                _ASM_SECOND, "=&r,=&r,r,r", [hi, lo], dtype=(hi.dtype, hi.dtype), is_pure=True, pack=PACK
            )
        else:
            even, odd = tl.inline_asm_elementwise(
                _ASM_FIRST, "=&r,=&r,r,r", [hi, lo], dtype=(hi.dtype, hi.dtype), is_pure=True, pack=PACK
            )
    else:
        HIGH: tl.constexpr = -252645136  # 0xF0F0F0F0
        LOW: tl.constexpr = 202116108  # 0x0C0C0C0C
        SIGNS: tl.constexpr = -2139062144  # 0x80808080
        nibbles, bits = hi.to(tl.int32), lo.to(tl.int32)
        first = bits >> 2 if SECOND else bits << 2
        second = bits >> 4 if SECOND else bits
        even = ((nibbles << 4) & HIGH | first & LOW) ^ SIGNS
        odd = (nibbles & HIGH | second & LOW) ^ SIGNS
    if hi.dtype == tl.int32:
        return even, odd
    else:
        return even.to(tl.int8), odd.to(tl.int8)


@triton.jit(do_not_specialize=["M", "N"])
def small_kernel(
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
        w0, w1 = unpack_pair(tl.load(hi + group * 64), two, False, ASM)
        w2, w3 = unpack_pair(tl.load(hi + group * 64 + 32), two, True, ASM)
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
        w0, w1 = unpack_pair(tl.load(hi + FULL * 64, mask=within[None, :], other=0), two, False, ASM)
        w2, w3 = unpack_pair(tl.load(hi + FULL * 64 + QUARTER, mask=within[None, :], other=0), two, True, ASM)
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
def few_bytes_kernel(
    a_ptr, sa_ptr, w_ptr, sw_ptr, bias_ptr, y_ptr, M, N, K_PAD, K, G,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """BN rows of int8 weights ``[N, K]`` by BM tokens, one product of depth 128 per group, weights as the first
    operand: tiles of few tokens then are no larger than the tokens. SPLIT as in :func:`small_kernel`, PARTIAL as in
    :func:`large_kernel`. Activation scales are ``[G, M]``.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    row, token = tl.minimum(rows, N - 1).to(tl.int64), tl.minimum(tokens, M - 1).to(tl.int64)
    k = tl.arange(0, 128)
    w = w_ptr + row[:, None] * K + k[None, :]
    a = a_ptr + token[None, :] * K_PAD + k[:, None]
    sw, sa = sw_ptr + row * G, sa_ptr + token
    acc = tl.zeros([BN, BM], tl.float32)
    share = tl.cdiv(G, SPLIT)
    part_index = tl.program_id(2)
    first = part_index * share
    # Scales are read one group ahead, as in large_kernel.
    start = tl.minimum(first, G - 1)
    next_sw, next_sa = tl.load(sw + start), tl.load(sa + start * M)
    for group in tl.range(first, tl.minimum(first + share, G), num_stages=STAGES):
        this_sw, this_sa = next_sw, next_sa
        ahead = tl.minimum(group + 1, G - 1)
        next_sw, next_sa = tl.load(sw + ahead), tl.load(sa + ahead * M)
        if PARTIAL:
            weights = tl.load(w + group * 128, mask=(group * 128 + k < K)[None, :], other=0)
        else:
            weights = tl.load(w + group * 128)
        part = tl.dot(weights, tl.load(a + group * 128), out_dtype=tl.int32)
        acc += part.to(tl.float32) * (this_sw.to(tl.float32)[:, None] * this_sa[None, :])
    if SPLIT == 1 and BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    out = y_ptr + (part_index.to(tl.int64) * M + tokens)[None, :] * N + rows[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])


@triton.jit(do_not_specialize=["M", "N"])
def reduce_kernel(
    parts_ptr, bias_ptr, y_ptr, M, N, SPLIT: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr
):
    """FACTOR times the sum of the SPLIT partial results of one token, always added in the same order."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64)
    acc = tl.zeros([BN], tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + (part * M + token) * N + rows, mask=rows < N, other=0.0)
    acc *= FACTOR
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * N + rows, acc.to(y_ptr.dtype.element_ty), mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def unpack_kernel(
    hi_ptr, lo_ptr, out_ptr, N, HI_BYTES, LO_BYTES, K_PAD, FULL,
    TAIL: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """GB groups of BN rows from the planes to ``4·c`` int8 ``[N, K_PAD]``; codes past K are written as 0."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    flat = tl.arange(0, GB * 32)[None, :]
    group, k = tl.program_id(1) * GB + flat // 32, flat % 32
    row = rows.to(tl.int64)[:, None]
    quarter = 32
    mask = (rows < N)[:, None] & (group < FULL)
    if TAIL:
        quarter = tl.where(group == FULL, TAIL // 4, 32)
        mask = (rows < N)[:, None] & (group <= FULL) & (k < quarter)
    hi = hi_ptr + row * HI_BYTES + group * 64 + k
    two = tl.load(lo_ptr + row * LO_BYTES + group * 32 + k, mask=mask, other=0)
    w0, w1 = unpack_pair(tl.load(hi, mask=mask, other=0), two, False, ASM)
    w2, w3 = unpack_pair(tl.load(hi + quarter, mask=mask, other=0), two, True, ASM)
    out = out_ptr + row * K_PAD + group * 128 + k
    tl.store(out, w0, mask=mask)
    tl.store(out + quarter, w1, mask=mask)
    tl.store(out + 2 * quarter, w2, mask=mask)
    tl.store(out + 3 * quarter, w3, mask=mask)
    if TAIL and (tl.program_id(1) * GB <= FULL) & (tl.program_id(1) * GB + GB > FULL):
        wide = tl.arange(0, 128)[None, :]
        padding = (rows < N)[:, None] & (wide >= TAIL)
        tl.store(out_ptr + row * K_PAD + FULL * 128 + wide, tl.zeros([BN, 128], tl.int8), mask=padding)


@triton.jit(do_not_specialize=["N", "N_PAD"])
def scale_kernel(sw_ptr, out_ptr, N, N_PAD, G, FACTOR: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr):
    """Scales ``[N, G]`` times FACTOR in float32 ``[G, N_PAD]``, a group's rows as :mod:`.gluon_prefill` reads them:
    of sixteen, a thread's four (two neighbours, and those eight rows on) side by side. Rows from N on are 0.
    """
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    group = tl.program_id(1) * GB + tl.arange(0, GB)
    row = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    inside = (row < N)[None, :] & (group < G)[:, None]
    scale = tl.load(sw_ptr + row.to(tl.int64)[None, :] * G + group[:, None], mask=inside, other=0.0)
    out = out_ptr + group.to(tl.int64)[:, None] * N_PAD + place[None, :]
    tl.store(out, scale.to(tl.float32) * FACTOR, mask=(place < N_PAD)[None, :] & (group < G)[:, None])


@triton.jit(do_not_specialize=["M", "N", "M_PAD", "N_PAD"])
def large_kernel(
    a_ptr, sa_ptr, w_ptr, sw_ptr, bias_ptr, y_ptr, M, N, M_PAD, N_PAD, K_PAD, K, G,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
    FACTOR: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """BM tokens by BN rows of int8 weights ``[N, K]``; one product of depth 128 per group, scaled into float32.

    FACTOR multiplies the result: ¼ for unpacked six-bit weights. PARTIAL: K ends inside the last group.

    Scales are float32 and group-major here: ``[G, M_PAD]`` and ``[G, N_PAD]``.
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
    w = w_ptr + row[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    sa, sw = sa_ptr + token, sw_ptr + row
    # Scales are read one group ahead: they feed no product, so nothing else hides their latency.
    next_sa, next_sw = tl.load(sa), tl.load(sw)
    for group in tl.range(0, G, num_stages=STAGES):
        this_sa, this_sw = next_sa, next_sw
        ahead = tl.minimum(group + 1, G - 1)
        next_sa, next_sw = tl.load(sa + ahead * M_PAD), tl.load(sw + ahead * N_PAD)
        if PARTIAL:
            weights = tl.load(w + group * 128, mask=(group * 128 + k < K)[:, None], other=0)
        else:
            weights = tl.load(w + group * 128)
        part = tl.dot(tl.load(a + group * 128), weights, out_dtype=tl.int32)
        acc += part.to(tl.float32) * (this_sa[:, None] * this_sw[None, :])
    acc *= FACTOR
    if BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    out = y_ptr + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < N)[None, :])
