# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Backward kernels: the normaliser's gradient rows, and one kernel per chunk for q, k, v and log_decay together.

The state before each chunk and the gradient of the state after it come from ``triton_forward.states``, run forwards
and backwards. Everything else is local to a chunk. The gate's gradient is a suffix sum of ``q ⊙ dq - k ⊙ dk`` *within
the chunk* plus the boundary term ``Σ S ⊙ dS``: a suffix over the whole sequence would add up rounding errors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_device import COUNTS
from .triton_blocks import (
    EPS,
    anti_causal,
    bounded,
    causal,
    chunk_rows,
    from_middle,
    from_start,
    halved_scores,
    halving,
    load_decay,
    load_rows,
    mix,
    same_block,
    store_rows,
    to_end,
)


@triton.jit(do_not_specialize=COUNTS)
def normaliser(
    q, k, g, o, grad, chunk_sums, wide, depths, weight, table,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t, o_b, o_h, o_t, do_b, do_h, do_t,
    T, scale, D, DV, HKV, CHUNKS,
    GROUP: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, WIDE: tl.constexpr,
    ADD: tl.constexpr, FINISH: tl.constexpr, VARLEN: tl.constexpr,
    BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For ``o = n / (z + eps)``: ``weight[0] = 1 / (z + eps)`` and ``weight[1] = dL/dz``, each ``[B, H, T]``.

    Keys in pieces (as in ``triton_forward.output``): ``weight[0]`` holds the pieces' sum of z until FINISH.
    """
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(wide + problem) != 0) != WIDE:
        return
    batch, kv_head = problem // HKV, problem % HKV
    first, last = chunk_rows(table, chunk, T, BT, VARLEN)
    keys, rows = tl.arange(0, BK), first + tl.arange(0, BT)
    ks = load_rows(k + batch * k_b + kv_head * k_h, k_t, first, last, D, BT, BK)
    sums = tl.load(chunk_sums + (problem * CHUNKS + chunk) * BK + keys)
    right = ks
    if DECAY:
        tile = load_decay(g + batch * g_b + kv_head * g_h, g_t, first, last, D, PER_KEY, BT, BK)
        if WIDE:
            tile = bounded(tile)
            depth = tl.load(depths + problem * CHUNKS + chunk)
            factor = tl.exp2(from_start(tile, BT))
        else:
            middle = from_middle(tile, BT)
            factor = tl.exp2(middle)
            right = (ks.to(tl.float32) * tl.exp2(-middle)).to(ks.dtype)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        qs = load_rows(q + batch * q_b + head * q_h, q_t, first, last, D, BT, BK)
        scaled = qs.to(tl.float32) * scale
        left = scaled
        if DECAY:
            left = scaled * factor
        if DECAY and WIDE:
            scores = halved_scores(scaled.to(ks.dtype), ks, tile, depth, False, LEVELS, BT, PRECISION)
        else:
            scores = causal(tl.dot(left.to(ks.dtype), tl.trans(right), input_precision=PRECISION), BT)
        z = tl.sum(scores, 1) + tl.sum(left * sums[None, :], 1)
        at = (problem * GROUP + member) * T + rows
        if ADD:
            z += tl.load(weight + at, mask=rows < last, other=0.0)
        if FINISH:
            inverse = 1.0 / (z + EPS)
            os = load_rows(o + batch * o_b + head * o_h, o_t, first, last, DV, BT, BV).to(tl.float32)
            dos = load_rows(grad + batch * do_b + head * do_h, do_t, first, last, DV, BT, BV).to(tl.float32)
            slope = -tl.sum(os * dos, 1) * inverse
            tl.store(weight + at, inverse, mask=rows < last)
            tl.store(weight + tl.num_programs(1).to(tl.int64) * GROUP * T + at, slope, mask=rows < last)
        else:
            tl.store(weight + at, z, mask=rows < last)


@triton.jit(do_not_specialize=COUNTS)
def value_gradients(
    q, k, g, grad, weight, wide, depths, state_slopes, dv, partial, table,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t, do_b, do_h, do_t, T, scale, D, DV, HKV, CHUNKS,
    GROUP: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, WIDE: tl.constexpr, NORMALIZE: tl.constexpr,
    ADD: tl.constexpr, VARLEN: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SLICE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dv`` of one chunk of one kv head: ``k̃ dS`` plus, for each of its query heads, scoresᵀ times the gradient.

    ADD: on top of what earlier pieces of the keys left in ``partial``.
    """
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(wide + problem) != 0) != WIDE:
        return
    batch, kv_head = problem // HKV, problem % HKV
    first, last = chunk_rows(table, chunk, T, BT, VARLEN)
    values, rows = tl.arange(0, BV), first + tl.arange(0, BT)
    slot = problem * CHUNKS + chunk
    d_v = tl.zeros([BT, BV], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        kq = tl.zeros([BT, BT], tl.float32)
        for column in tl.range(0, BK, SLICE, num_stages=STAGES):
            keys, width = column + tl.arange(0, SLICE), D - column
            ks = load_rows(k + batch * k_b + kv_head * k_h + column, k_t, first, last, width, BT, SLICE)
            qs = load_rows(q + batch * q_b + head * q_h + column, q_t, first, last, width, BT, SLICE)
            read = qs.to(tl.float32) * scale
            written = ks
            if DECAY:
                gates = g + batch * g_b + kv_head * g_h + (column if PER_KEY else 0)
                tile = load_decay(gates, g_t, first, last, width, PER_KEY, BT, SLICE)
                if WIDE:
                    tile = bounded(tile)
                    depth = tl.load(depths + slot)
                    written = (ks.to(tl.float32) * tl.exp2(to_end(tile, BT))).to(ks.dtype)
                    kq += halved_scores(read.to(ks.dtype), ks, tile, depth, True, LEVELS, BT, PRECISION)
                else:
                    middle = from_middle(tile, BT)
                    read = read * tl.exp2(middle)
                    written = (ks.to(tl.float32) * tl.exp2(-middle)).to(ks.dtype)
            if not (DECAY and WIDE):
                kq = tl.dot(written, tl.trans(read.to(ks.dtype)), acc=kq, input_precision=PRECISION)
            if member == 0:
                block = slot * BV * BK + values[:, None] * BK + keys[None, :]
                after = tl.load(state_slopes + block)
                d_v = tl.dot(written, tl.trans(after), acc=d_v, input_precision=PRECISION)
        kq = anti_causal(kq, BT)
        if NORMALIZE:
            inverse = tl.load(weight + (problem * GROUP + member) * T + rows, mask=rows < last, other=0.0)
            kq *= inverse[None, :]
        dos = load_rows(grad + batch * do_b + head * do_h, do_t, first, last, DV, BT, BV)
        d_v = tl.dot(kq.to(dos.dtype), dos, acc=d_v, input_precision=PRECISION)
    if ADD:
        d_v += load_rows(partial + problem * T * DV, DV, first, last, DV, BT, BV)
    store_rows(dv + problem * T * DV, DV, first, last, DV, d_v, BT, BV)


@triton.jit(do_not_specialize=COUNTS)
def key_gradients(
    q, k, v, g, grad, weight, wide, depths, chunk_states, chunk_sums, state_slopes, sum_slopes, dq, dk, dg, table,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, do_b, do_h, do_t,
    first_half, second_half, T, scale, D, ROW, DV, HKV, CHUNKS,
    GROUP: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, WIDE: tl.constexpr, NORMALIZE: tl.constexpr,
    VARLEN: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq``, ``dk`` and ``dg`` of one chunk and one slice of key channels; their rows are ROW elements apart. A
    per-head ``dg`` is summed over slices by the caller: ``dg`` is ``[BH, T, ROW]``, or ``[slices, BH, T]`` of float32.
    """
    part, chunk, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if (tl.load(wide + problem) != 0) != WIDE:
        return
    batch, kv_head = problem // HKV, problem % HKV
    first, last = chunk_rows(table, chunk, T, BT, VARLEN)
    column = part * SLICE
    width = D - column
    keys, values, rows = column + tl.arange(0, SLICE), tl.arange(0, BV), first + tl.arange(0, BT)
    slot = problem * CHUNKS + chunk
    vs = load_rows(v + batch * v_b + kv_head * v_h, v_t, first, last, DV, BT, BV)
    block = slot * BV * BK + values[:, None] * BK + keys[None, :]
    before, after = tl.load(chunk_states + block), tl.load(state_slopes + block)
    ks = load_rows(k + batch * k_b + kv_head * k_h + column, k_t, first, last, width, BT, SLICE)
    if NORMALIZE:
        sums, sums_after = tl.load(chunk_sums + slot * BK + keys), tl.load(sum_slopes + slot * BK + keys)
    written = ks
    if DECAY:
        gates = g + batch * g_b + kv_head * g_h + (column if PER_KEY else 0)
        tile = load_decay(gates, g_t, first, last, width, PER_KEY, BT, SLICE)
        if WIDE:
            tile = bounded(tile)
            depth = tl.load(depths + slot)
            read_factor, write_factor = tl.exp2(from_start(tile, BT)), tl.exp2(to_end(tile, BT))
        else:
            middle = from_middle(tile, BT)
            read_factor, write_factor = tl.exp2(middle), tl.exp2(-middle)
        written = (ks.to(tl.float32) * write_factor).to(ks.dtype)
        if not WIDE:
            # Computed again at the end: a tile of float32 less in registers meanwhile.
            write_factor = read_factor
    # d_written and d_read are gradients of the decayed factors; the wide path adds undecayed parts apart.
    d_written = tl.dot(vs, after, input_precision=PRECISION)
    if NORMALIZE:
        d_written += sums_after[None, :]
    if DECAY:
        # The diagonal of a product: both tiles are on their way to the matrix unit, and needn't come to registers.
        channel, other = tl.arange(0, SLICE)[:, None], tl.arange(0, SLICE)[None, :]
        square = tl.dot(tl.trans(before), after, input_precision=PRECISION)
        crossing = tl.sum(tl.where(channel == other, square, 0.0), 0)
        if NORMALIZE:
            crossing += sums * sums_after
        if WIDE:
            halves = slot * BK + keys
            crossing *= tl.exp2(tl.load(first_half + halves) + tl.load(second_half + halves))
        crossing += tl.sum(written.to(tl.float32) * d_written, 0)
        moved = tl.zeros([BT, SLICE], tl.float32)
        if WIDE:
            d_plain = tl.zeros([BT, SLICE], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        dos = load_rows(grad + batch * do_b + head * do_h, do_t, first, last, DV, BT, BV)
        qs = load_rows(q + batch * q_b + head * q_h + column, q_t, first, last, width, BT, SLICE)
        scaled = qs.to(tl.float32) * scale
        read = scaled
        if DECAY:
            read = scaled * read_factor
        read = read.to(ks.dtype)
        if NORMALIZE:
            at = (problem * GROUP + member) * T + rows
            inverse = tl.load(weight + at, mask=rows < last, other=0.0)
            slope = tl.load(weight + tl.num_programs(2).to(tl.int64) * GROUP * T + at, mask=rows < last, other=0.0)
        # One product after the other, each rounded as soon as it is there.
        vd = tl.dot(vs, tl.trans(dos), input_precision=PRECISION)
        if NORMALIZE:
            vd = vd * inverse[None, :] + slope[None, :]
        vd = anti_causal(vd, BT).to(ks.dtype)
        if not (DECAY and WIDE):
            d_written = tl.dot(vd, read, acc=d_written, input_precision=PRECISION)
        dv_scores = tl.dot(dos, tl.trans(vs), input_precision=PRECISION)
        if NORMALIZE:
            dv_scores = dv_scores * inverse[:, None] + slope[:, None]
        dv_scores = causal(dv_scores, BT).to(ks.dtype)
        d_read = tl.dot(dos, before, input_precision=PRECISION)
        if NORMALIZE:
            d_read = d_read * inverse[:, None] + slope[:, None] * sums[None, :]
        if DECAY and WIDE:
            moved += read.to(tl.float32) * d_read
            d_q = d_read * read_factor
            qb = scaled.to(ks.dtype)
            for shift in range(LEVELS - depth, LEVELS + 1):
                left_factor, right_factor = halving(tile, shift, shift == LEVELS - depth, BT)
                same = same_block(shift, BT)
                left = (qb.to(tl.float32) * left_factor).to(ks.dtype)
                right = (ks.to(tl.float32) * right_factor).to(ks.dtype)
                d_left = tl.dot(tl.where(same, dv_scores, 0.0).to(ks.dtype), right, input_precision=PRECISION)
                d_right = tl.dot(tl.where(same, vd, 0.0).to(ks.dtype), left, input_precision=PRECISION)
                # Rows that don't meet any have factors of 0.
                moved += left.to(tl.float32) * d_left - right.to(tl.float32) * d_right
                d_q += d_left * left_factor
                d_plain += d_right * right_factor
        else:
            d_q = tl.dot(dv_scores, written, acc=d_read, input_precision=PRECISION)
            if DECAY:
                moved += read.to(tl.float32) * d_q
                d_q = d_q * read_factor
        store_rows(dq + (problem * GROUP + member) * T * ROW + column, ROW, first, last, width, d_q * scale, BT, SLICE)
    d_k = d_written
    if DECAY:
        moved -= written.to(tl.float32) * d_written
        if WIDE:
            d_k = d_written * write_factor + d_plain
        else:
            d_k = d_written / write_factor
        i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
        d_g = mix((j >= i).to(tl.float32), moved, PRECISION != "ieee") + crossing[None, :]
        if PER_KEY:
            store_rows(dg + problem * T * ROW + column, ROW, first, last, width, d_g, BT, SLICE)
        else:
            at = (part * tl.num_programs(2) + problem) * T + rows
            tl.store(dg + at, tl.sum(d_g, 1), mask=rows < last)
    store_rows(dk + problem * T * ROW + column, ROW, first, last, width, d_k, BT, SLICE)
