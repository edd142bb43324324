"""Backward kernels: the normaliser's gradient rows, and one kernel per chunk for q, k, v and log_decay together.

The state before each chunk and the gradient of the state after it come from ``triton_forward.states``, run forwards
and backwards. Everything else is local to a chunk. The gate's gradient is a suffix sum of ``q ⊙ dq - k ⊙ dk`` *within
the chunk* plus the boundary term ``Σ S ⊙ dS``: a suffix over the whole sequence would add up rounding errors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    EPS,
    anti_causal,
    bounded,
    causal,
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


@triton.jit
def normaliser(
    q, k, g, o, grad, chunk_sums, wide, weight,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t, o_b, o_h, o_t, do_b, do_h, do_t,
    T, scale, D, DV, HKV, CHUNKS,
    GROUP: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For ``o = n / (z + eps)``: ``weight[0] = 1 / (z + eps)`` and ``weight[1] = dL/dz``, each ``[B, H, T]``."""
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(wide + problem) != 0) != WIDE:
        return
    batch, kv_head = problem // HKV, problem % HKV
    keys, rows = tl.arange(0, BK), chunk * BT + tl.arange(0, BT)
    ks = load_rows(k + batch * k_b + kv_head * k_h, k_t, chunk * BT, T, D, BT, BK)
    sums = tl.load(chunk_sums + (problem * CHUNKS + chunk) * BK + keys)
    right = ks
    if DECAY:
        tile = load_decay(g + batch * g_b + kv_head * g_h, g_t, chunk * BT, T, D, PER_KEY, BT, BK)
        if WIDE:
            tile = bounded(tile)
            factor = tl.exp2(from_start(tile, BT))
        else:
            middle = from_middle(tile, BT)
            factor = tl.exp2(middle)
            right = (ks.to(tl.float32) * tl.exp2(-middle)).to(ks.dtype)
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        qs = load_rows(q + batch * q_b + head * q_h, q_t, chunk * BT, T, D, BT, BK)
        scaled = qs.to(tl.float32) * scale
        left = scaled
        if DECAY:
            left = scaled * factor
        if DECAY and WIDE:
            scores = halved_scores(scaled.to(ks.dtype), ks, tile, BT, PRECISION)
        else:
            scores = causal(tl.dot(left.to(ks.dtype), tl.trans(right), input_precision=PRECISION), BT)
        inverse = 1.0 / (tl.sum(scores, 1) + tl.sum(left * sums[None, :], 1) + EPS)
        os = load_rows(o + batch * o_b + head * o_h, o_t, chunk * BT, T, DV, BT, BV).to(tl.float32)
        dos = load_rows(grad + batch * do_b + head * do_h, do_t, chunk * BT, T, DV, BT, BV).to(tl.float32)
        slope = -tl.sum(os * dos, 1) * inverse
        at = (problem * GROUP + member) * T + rows
        tl.store(weight + at, inverse, mask=rows < T)
        tl.store(weight + tl.num_programs(1).to(tl.int64) * GROUP * T + at, slope, mask=rows < T)


@triton.jit
def gradients(
    q, k, v, g, grad, weight, wide, chunk_states, chunk_sums, state_slopes, sum_slopes, dq, dk, dv, dg,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, do_b, do_h, do_t,
    first_half, second_half, T, scale, D, DV, HKV, CHUNKS,
    GROUP: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, WIDE: tl.constexpr, NORMALIZE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one kv head with its GROUP query heads. Outputs are contiguous ``[B, heads, T, width]``."""
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(wide + problem) != 0) != WIDE:
        return
    batch, kv_head = problem // HKV, problem % HKV
    first = chunk * BT
    keys, values, rows = tl.arange(0, BK), tl.arange(0, BV), first + tl.arange(0, BT)
    slot = problem * CHUNKS + chunk
    ks = load_rows(k + batch * k_b + kv_head * k_h, k_t, first, T, D, BT, BK)
    vs = load_rows(v + batch * v_b + kv_head * v_h, v_t, first, T, DV, BT, BV)
    block = slot * BV * BK + values[:, None] * BK + keys[None, :]
    before, after = tl.load(chunk_states + block), tl.load(state_slopes + block)
    if NORMALIZE:
        sums, sums_after = tl.load(chunk_sums + slot * BK + keys), tl.load(sum_slopes + slot * BK + keys)
    written = ks
    if DECAY:
        tile = load_decay(g + batch * g_b + kv_head * g_h, g_t, first, T, D, PER_KEY, BT, BK)
        if WIDE:
            tile = bounded(tile)
            read_factor, write_factor = tl.exp2(from_start(tile, BT)), tl.exp2(to_end(tile, BT))
        else:
            middle = from_middle(tile, BT)
            read_factor, write_factor = tl.exp2(middle), tl.exp2(-middle)
        written = (ks.to(tl.float32) * write_factor).to(ks.dtype)
    # dk and dq stay gradients of the decayed factors until the end; the wide path adds undecayed parts apart.
    d_written = tl.dot(vs, after, input_precision=PRECISION)
    if NORMALIZE:
        d_written += sums_after[None, :]
    d_v = tl.dot(written, tl.trans(after), input_precision=PRECISION)
    if DECAY:
        crossing = tl.sum(before.to(tl.float32) * after.to(tl.float32), 0)
        if NORMALIZE:
            crossing += sums * sums_after
        if WIDE:
            halves = slot * BK + keys
            crossing *= tl.exp2(tl.load(first_half + halves) + tl.load(second_half + halves))
        crossing += tl.sum(written.to(tl.float32) * d_written, 0)
        moved = tl.zeros([BT, BK], tl.float32)
        d_plain = tl.zeros([BT, BK], tl.float32)
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        qs = load_rows(q + batch * q_b + head * q_h, q_t, first, T, D, BT, BK)
        dos = load_rows(grad + batch * do_b + head * do_h, do_t, first, T, DV, BT, BV)
        scaled = qs.to(tl.float32) * scale
        read = scaled
        if DECAY:
            read = scaled * read_factor
        read = read.to(ks.dtype)
        vd = tl.dot(vs, tl.trans(dos), input_precision=PRECISION)
        dv_scores = tl.dot(dos, tl.trans(vs), input_precision=PRECISION)
        d_read = tl.dot(dos, before, input_precision=PRECISION)
        if NORMALIZE:
            at = (problem * GROUP + member) * T + rows
            inverse = tl.load(weight + at, mask=rows < T, other=0.0)
            slope = tl.load(weight + tl.num_programs(1).to(tl.int64) * GROUP * T + at, mask=rows < T, other=0.0)
            vd = vd * inverse[None, :] + slope[None, :]
            dv_scores = dv_scores * inverse[:, None] + slope[:, None]
            d_read = d_read * inverse[:, None] + slope[:, None] * sums[None, :]
        vd, dv_scores = anti_causal(vd, BT), causal(dv_scores, BT)
        if DECAY and WIDE:
            moved += read.to(tl.float32) * d_read
            d_q = d_read * read_factor
            i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
            plain = scaled.to(ks.dtype)
            kf, qf = ks.to(tl.float32), plain.to(tl.float32)
            kq = tl.where(i == j, tl.dot(ks, tl.trans(plain), input_precision=PRECISION), 0.0)
            own = tl.sum(tl.where(i == j, dv_scores, 0.0), 1)[:, None]
            d_q += own * kf
            d_plain += own * qf
            for level in tl.static_range(7):
                if (BT >> level) >= 2:
                    factor, late = halving(tile, BT >> level, BT)
                    same = same_block(BT >> level, BT)
                    left = tl.where(late, qf * factor, 0.0).to(ks.dtype)
                    right = tl.where(late, 0.0, kf * factor).to(ks.dtype)
                    kq += tl.where(same, tl.dot(right, tl.trans(left), input_precision=PRECISION), 0.0)
                    part = tl.where(same, dv_scores, 0.0).to(ks.dtype)
                    d_left = tl.where(late, tl.dot(part, right, input_precision=PRECISION), 0.0)
                    part = tl.where(same, vd, 0.0).to(ks.dtype)
                    d_right = tl.where(late, 0.0, tl.dot(part, left, input_precision=PRECISION))
                    moved += left.to(tl.float32) * d_left - right.to(tl.float32) * d_right
                    d_q += d_left * factor
                    d_plain += d_right * factor
        else:
            kq = anti_causal(tl.dot(written, tl.trans(read), input_precision=PRECISION), BT)
            d_written = tl.dot(vd.to(ks.dtype), read, acc=d_written, input_precision=PRECISION)
            d_read = tl.dot(dv_scores.to(ks.dtype), written, acc=d_read, input_precision=PRECISION)
            d_q = d_read
            if DECAY:
                moved += read.to(tl.float32) * d_read
                d_q = d_read * read_factor
        if NORMALIZE:
            kq *= inverse[None, :]
        d_v = tl.dot(kq.to(ks.dtype), dos, acc=d_v, input_precision=PRECISION)
        store_rows(dq + (problem * GROUP + member) * T * D, D, first, T, D, d_q * scale, BT, BK)
    d_k = d_written
    if DECAY:
        moved -= written.to(tl.float32) * d_written
        d_k = d_written * write_factor + d_plain
        i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
        d_g = mix((j >= i).to(tl.float32), moved) + crossing[None, :]
        if PER_KEY:
            store_rows(dg + problem * T * D, D, first, T, D, d_g, BT, BK)
        else:
            tl.store(dg + problem * T + rows, tl.sum(d_g, 1).to(dg.dtype.element_ty), mask=rows < T)
    store_rows(dk + problem * T * D, D, first, T, D, d_k, BT, BK)
    store_rows(dv + problem * T * DV, DV, first, T, DV, d_v, BT, BV)
