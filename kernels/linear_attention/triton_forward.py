# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Forward kernels: chunk decays, segment states, their scan, the fused output, the normaliser, one decode step.

The sequence is cut into segments so that a few long sequences still fill the chip. With one segment a single fused
kernel does everything: the state stays in registers and every input is read once. With several, ``states`` first
sums each segment up and ``scan`` chains the sums.

Shapes inside: BH = B · Hkv problems, GROUP query heads each; chunk arrays are ``[BH, CHUNKS, BK]``; a stored chunk
state is transposed, ``[BV, BK]``; segment states are ``[BH, SEGMENTS, D, E]`` with E = Dv (+ 1 when normalised).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_device import COUNTS, LOG2E
from .triton_blocks import (
    EPS,
    bounded,
    causal,
    chunk_rows,
    from_middle,
    from_start,
    halved_scores,
    load_decay,
    load_rows,
    segment_chunks,
    store_rows,
    to_end,
)


@triton.jit(do_not_specialize=COUNTS)
def chunk_decays(
    g, first_half, second_half, wide, table, g_b, g_h, g_t, T, D, HKV, CHUNKS, LIMIT,
    PER_KEY: tl.constexpr, VARLEN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Log2-decay of each half chunk; ``wide[problem]`` becomes 1 where one anchor per chunk isn't enough."""
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = g + problem // HKV * g_b + problem % HKV * g_h
    first, last = chunk_rows(table, chunk, T, BT, VARLEN)
    HALF: tl.constexpr = BT // 2
    one = tl.sum(load_decay(base, g_t, first, last, D, PER_KEY, HALF, BK).to(tl.float32), 0)
    two = tl.sum(load_decay(base, g_t, first + HALF, last, D, PER_KEY, HALF, BK).to(tl.float32), 0)
    out = (problem * CHUNKS + chunk) * BK + tl.arange(0, BK)
    tl.store(first_half + out, one * LOG2E)
    tl.store(second_half + out, two * LOG2E)
    if not (tl.min(tl.minimum(one, two)) >= -LIMIT):  # true for NaN as well
        tl.atomic_max(wide + problem, 1)


@triton.jit(do_not_specialize=COUNTS)
def chunk_depths(
    g, wide, depths, table, g_b, g_h, g_t, T, D, HKV, CHUNKS, LIMIT,
    PER_KEY: tl.constexpr, VARLEN: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``depths [BH, CHUNKS]``: how often a chunk of a wide problem is halved until no half block decays by more than
    LIMIT. (A kernel of its own: it takes registers that ``chunk_decays`` is fast without.)
    """
    chunk, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(wide + problem) == 0:
        return
    base = g + problem // HKV * g_b + problem % HKV * g_h
    first, last = chunk_rows(table, chunk, T, BT, VARLEN)
    rows = load_decay(base, g_t, first, last, D, PER_KEY, BT, BK).to(tl.float32)
    depth = 0
    for level in tl.static_range(LEVELS):
        # Rows are sums over 2**level tokens: the half blocks of blocks of 2**(level + 1).
        depth = tl.where(tl.min(rows) >= -LIMIT, depth, tl.maximum(depth, LEVELS - level))  # NaN is not above
        rows = tl.sum(tl.reshape(rows, [BT >> (level + 1), 2, BK]), 1)
    tl.store(depths + problem * CHUNKS + chunk, depth)


@triton.jit
def load_state(base, D, DV, E, BK: tl.constexpr, BV: tl.constexpr):
    """A ``[D, E]`` state as its transpose ``[BV, BK]``."""
    cols, rows = tl.arange(0, BK), tl.arange(0, BV)
    mask = (rows < DV)[:, None] & (cols < D)[None, :]
    return tl.load(base + cols[None, :] * E + rows[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(base, state, D, DV, E, BK: tl.constexpr, BV: tl.constexpr):
    """The inverse of ``load_state``."""
    cols, rows = tl.arange(0, BK), tl.arange(0, BV)
    mask = (rows < DV)[:, None] & (cols < D)[None, :]
    tl.store(base + cols[None, :] * E + rows[:, None], state, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def states(
    x, y, g, weight, first_half, second_half, wide, start, chunk_states, chunk_sums, end, total, table, runs,
    x_b, x_h, x_t, y_b, y_h, y_t, g_b, g_h, g_t, T, scale, D, DV, HKV, CHUNKS, SEGMENTS, PER_SEGMENT,
    GROUP: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, WIDE: tl.constexpr,
    NORMALIZE: tl.constexpr, WEIGHTED: tl.constexpr, HAS_START: tl.constexpr, STORE_CHUNKS: tl.constexpr,
    VARLEN: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Run the state over a segment's chunks: ``S ← e^… ⊙ S + x̃ᵀ y``, summing over GROUP heads of x and y.

    A program keeps SLICE key channels of the state; they don't meet. Forward: x = k, y = v. REVERSE: x = q, y = the
    outputs' gradient, time runs backwards, and ``weight`` holds two rows ``[2, B, H, T]``: a factor for y and the
    gradient of the normaliser. ``first_half`` is the half chunk that lies between the carried state and the chunk's
    middle, ``second_half`` the other.
    STORE_CHUNKS keeps every chunk's carried state (anchored unless WIDE); otherwise only the end is written, and the
    segment's whole log2-decay to ``total``.
    """
    segment, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(wide + problem) != 0) != WIDE:
        return
    batch, kv_head = problem // HKV, problem % HKV
    E = DV + NORMALIZE
    column = tl.program_id(2) * SLICE
    width = D - column
    keys, values = tl.arange(0, SLICE), tl.arange(0, BV)
    state = tl.zeros([BV, SLICE], tl.float32)
    sums = tl.zeros([SLICE], tl.float32)
    where = (problem * SEGMENTS + segment) * D * E + column * E
    if HAS_START:
        state = load_state(start + where, width, DV, E, SLICE, BV)
        if NORMALIZE:
            sums = tl.load(start + where + keys * E + DV, mask=keys < width, other=0.0).to(tl.float32)
    pending = tl.zeros([SLICE], tl.float32)
    whole = tl.zeros([SLICE], tl.float32)
    begin, count = segment_chunks(runs, segment, PER_SEGMENT, CHUNKS, VARLEN)
    for step in tl.range(0, count, num_stages=STAGES):
        chunk = begin + (count - 1 - step if REVERSE else step)
        first, last = chunk_rows(table, chunk, T, BT, VARLEN)
        if DECAY:
            halves = (problem * CHUNKS + chunk) * BK + column + keys
            one, two = tl.load(first_half + halves), tl.load(second_half + halves)
            whole += one + two
            gates = g + batch * g_b + kv_head * g_h + (column if PER_KEY else 0)
            tile = load_decay(gates, g_t, first, last, width, PER_KEY, BT, SLICE)
            if WIDE:
                tile = bounded(tile)
                factor = tl.exp2(from_start(tile, BT) if REVERSE else to_end(tile, BT))
            else:
                state *= tl.exp2(pending + one)[None, :]
                if NORMALIZE:
                    sums *= tl.exp2(pending + one)
                pending = two
                middle = from_middle(tile, BT)
                factor = tl.exp2(middle if REVERSE else -middle)
        if STORE_CHUNKS:
            slot = problem * CHUNKS + chunk
            pointers = chunk_states + slot * BV * BK + column + values[:, None] * BK + keys[None, :]
            tl.store(pointers, state.to(chunk_states.dtype.element_ty))
            if NORMALIZE:
                tl.store(chunk_sums + slot * BK + column + keys, sums)
        if DECAY and WIDE:
            state *= tl.exp2(one + two)[None, :]
            if NORMALIZE:
                sums *= tl.exp2(one + two)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            xs = load_rows(x + batch * x_b + head * x_h + column, x_t, first, last, width, BT, SLICE)
            ys = load_rows(y + batch * y_b + head * y_h, y_t, first, last, DV, BT, BV)
            scaled = xs.to(tl.float32) * scale
            if DECAY:
                scaled *= factor
            if NORMALIZE:
                if WEIGHTED:
                    rows = first + tl.arange(0, BT)
                    at = (problem * GROUP + member) * T + rows
                    batches = tl.num_programs(1).to(tl.int64) * GROUP * T
                    inverse = tl.load(weight + at, mask=rows < last, other=0.0)
                    slope = tl.load(weight + batches + at, mask=rows < last, other=0.0)
                    sums += tl.sum(scaled * slope[:, None], 0)
                    scaled *= inverse[:, None]
                else:
                    sums += tl.sum(scaled, 0)
            state = tl.dot(tl.trans(ys), scaled.to(ys.dtype), acc=state, input_precision=PRECISION)
    if DECAY and not WIDE:
        state *= tl.exp2(pending)[None, :]
        sums *= tl.exp2(pending)
    store_state(end + where, state, width, DV, E, SLICE, BV)
    if NORMALIZE:
        tl.store(end + where + keys * E + DV, sums, mask=keys < width)
    if DECAY and not STORE_CHUNKS:
        tl.store(total + (problem * SEGMENTS + segment) * BK + column + keys, whole)


@triton.jit(do_not_specialize=COUNTS)
def scan(
    added, total, initial, carried, final, runs, D, E, SEGMENTS,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr, VARLEN: tl.constexpr,
    BK: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Chain segment sums ``[BH, SEGMENTS, D, E]``: what each segment starts from, and the last state.

    With VARLEN each sequence has a program, and its own initial and final state ``[BH, SEQUENCES, D, E]``.
    """
    problem, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2)
    own = (problem * tl.num_programs(2) + sequence) * D * E
    begin, count = 0, SEGMENTS
    if VARLEN:
        begin = tl.load(runs + 2 * SEGMENTS + 2 * sequence)
        count = tl.load(runs + 2 * SEGMENTS + 2 * sequence + 1)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    tile = rows[:, None] * E + cols[None, :]
    mask = (rows < D)[:, None] & (cols < E)[None, :]
    state = tl.zeros([ROWS, BE], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + own + tile, mask=mask, other=0.0).to(tl.float32)
    for step in range(count):
        slot = problem * SEGMENTS + begin + (count - 1 - step if REVERSE else step)
        tl.store(carried + slot * D * E + tile, state, mask=mask)
        if DECAY:
            state *= tl.exp2(tl.load(total + slot * BK + rows, mask=rows < D, other=0.0))[:, None]
        state += tl.load(added + slot * D * E + tile, mask=mask, other=0.0)
    tl.store(final + own + tile, state, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def output(
    q, k, v, g, first_half, second_half, wide, depths, start, o, end, partial, partial_sums, table, runs,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t,
    T, scale, D, DV, HKV, CHUNKS, SEGMENTS, PER_SEGMENT,
    GROUP: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, WIDE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_START: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr, VARLEN: tl.constexpr, ENDS: tl.constexpr,
    BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The fused forward of one segment and one block of BV value columns; the state never leaves the registers.

    Keys wider than a block come in pieces, one launch each: all but the last write their share to ``o`` as it is and
    the normaliser's to ``partial_sums [B, H, T]`` (not FINISH); all but the first ADD the shares so far, in
    ``partial`` (laid out as ``o``) and ``partial_sums``. ENDS: the segments are whole sequences, and each writes its
    last state; otherwise the last segment does.
    """
    block, segment, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if (tl.load(wide + problem) != 0) != WIDE:
        return
    batch, kv_head = problem // HKV, problem % HKV
    E = DV + NORMALIZE
    column = block * BV
    width = DV - column
    keys = tl.arange(0, BK)
    state = tl.zeros([BV, BK], tl.float32)
    sums = tl.zeros([BK], tl.float32)
    where = (problem * SEGMENTS + segment) * D * E
    if HAS_START:
        state = load_state(start + where + column, D, width, E, BK, BV)
        if NORMALIZE:
            sums = tl.load(start + where + keys * E + DV, mask=keys < D, other=0.0).to(tl.float32)
    pending = tl.zeros([BK], tl.float32)
    begin, count = segment_chunks(runs, segment, PER_SEGMENT, CHUNKS, VARLEN)
    for chunk in tl.range(begin, begin + count, num_stages=STAGES):
        first, last = chunk_rows(table, chunk, T, BT, VARLEN)
        ks = load_rows(k + batch * k_b + kv_head * k_h, k_t, first, last, D, BT, BK)
        vs = load_rows(v + batch * v_b + kv_head * v_h + column, v_t, first, last, width, BT, BV)
        right = ks
        if DECAY:
            halves = (problem * CHUNKS + chunk) * BK + keys
            one, two = tl.load(first_half + halves), tl.load(second_half + halves)
            tile = load_decay(g + batch * g_b + kv_head * g_h, g_t, first, last, D, PER_KEY, BT, BK)
            if WIDE:
                tile = bounded(tile)
                depth = tl.load(depths + problem * CHUNKS + chunk)
                factor = tl.exp2(from_start(tile, BT))
                right = (ks.to(tl.float32) * tl.exp2(to_end(tile, BT))).to(ks.dtype)
            else:
                state *= tl.exp2(pending + one)[None, :]
                if NORMALIZE:
                    sums *= tl.exp2(pending + one)
                pending = two
                middle = from_middle(tile, BT)
                factor = tl.exp2(middle)
                right = (ks.to(tl.float32) * tl.exp2(-middle)).to(ks.dtype)
        if NORMALIZE:
            added = tl.sum(right.to(tl.float32), 0)
        read = tl.trans(state.to(vs.dtype))
        for member in range(GROUP):
            head = kv_head * GROUP + member
            qs = load_rows(q + batch * q_b + head * q_h, q_t, first, last, D, BT, BK)
            scaled = qs.to(tl.float32) * scale
            left = scaled
            if DECAY:
                left = scaled * factor
            if NORMALIZE:
                # Before the products: the float32 factor needn't outlive them.
                carried = tl.sum(left * sums[None, :], 1)
            if DECAY and WIDE:
                scores = halved_scores(scaled.to(ks.dtype), ks, tile, depth, False, LEVELS, BT, PRECISION)
            else:
                scores = causal(tl.dot(left.to(ks.dtype), tl.trans(right), input_precision=PRECISION), BT)
            out = tl.dot(left.to(vs.dtype), read, input_precision=PRECISION)
            out = tl.dot(scores.to(vs.dtype), vs, acc=out, input_precision=PRECISION)
            if ADD:
                out += load_rows(partial + batch * o_b + head * o_h + column, o_t, first, last, width, BT, BV)
            if NORMALIZE:
                normaliser = tl.sum(scores, 1) + carried
                rows = first + tl.arange(0, BT)
                at = (problem * GROUP + member) * T + rows
                if ADD:
                    normaliser += tl.load(partial_sums + at, mask=rows < last, other=0.0)
                if FINISH:
                    out = out / (normaliser + EPS)[:, None]
                else:
                    # Every block of value columns would write the same sums.
                    tl.store(partial_sums + at, normaliser, mask=rows < tl.where(block == 0, last, 0))
            store_rows(o + batch * o_b + head * o_h + column, o_t, first, last, width, out, BT, BV)
        if DECAY and WIDE:
            state *= tl.exp2(one + two)[None, :]
            if NORMALIZE:
                sums *= tl.exp2(one + two)
        state = tl.dot(tl.trans(vs), right.to(vs.dtype), acc=state, input_precision=PRECISION)
        if NORMALIZE:
            sums += added
    if ENDS or segment == SEGMENTS - 1:
        if DECAY and not WIDE:
            state *= tl.exp2(pending)[None, :]
            sums *= tl.exp2(pending)
        target = end + (problem * SEGMENTS + segment if ENDS else problem) * D * E
        store_state(target + column, state, D, width, E, BK, BV)
        if NORMALIZE:
            tl.store(target + keys * E + DV, sums, mask=keys < tl.where(block == 0, D, 0))


@triton.jit(do_not_specialize=COUNTS)
def decode(
    q, k, v, g, initial, o, final, q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, scale, D, DV, HKV,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, DECAY: tl.constexpr, PER_KEY: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: read a block of BV state columns once, write it once; MEMBERS of the query heads at a time."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = problem // HKV, problem % HKV
    E = DV + NORMALIZE
    keys, cols = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    ks = tl.load(k + batch * k_b + kv_head * k_h + keys, mask=keys < D, other=0.0).to(tl.float32)
    vs = tl.load(v + batch * v_b + kv_head * v_h + cols, mask=cols < DV, other=0.0).to(tl.float32)
    tile = problem * D * E + keys[:, None] * E + cols[None, :]
    mask = (keys < D)[:, None] & (cols < DV)[None, :]
    column = problem * D * E + keys * E + DV
    state = ks[:, None] * vs[None, :]
    sums = ks
    if HAS_INITIAL:
        before = tl.load(initial + tile, mask=mask, other=0.0).to(tl.float32)
        before_sums = tl.zeros([BK], tl.float32)
        if NORMALIZE:
            before_sums = tl.load(initial + column, mask=keys < D, other=0.0).to(tl.float32)
        if DECAY:
            gates = g + batch * g_b + kv_head * g_h
            decay = tl.load(gates + (keys if PER_KEY else keys * 0), mask=keys < D, other=0.0).to(tl.float32)
            decay = tl.exp2(decay * LOG2E)
            before *= decay[:, None]
            before_sums *= decay
        state += before
        sums += before_sums
    # The state is stored last: queries that are read behind a store wait for memory anew.
    for first in range(0, GROUP, MEMBERS):
        member = first + tl.arange(0, MEMBERS)
        head, given = kv_head * GROUP + member, member < GROUP
        qs = q + batch * q_b + head[:, None] * q_h + keys[None, :]
        qs = tl.load(qs, mask=given[:, None] & (keys < D)[None, :], other=0.0).to(tl.float32) * scale
        out = tl.sum(qs[:, :, None] * state[None, :, :], 1)
        if NORMALIZE:
            out = out / (tl.sum(qs * sums[None, :], 1) + EPS)[:, None]
        target = o + (problem * GROUP + member)[:, None] * DV + cols[None, :]
        tl.store(target, out.to(o.dtype.element_ty), mask=given[:, None] & (cols < DV)[None, :])
    tl.store(final + tile, state, mask=mask)
    if NORMALIZE:
        tl.store(final + column, sums, mask=keys < tl.where(block == 0, D, 0))
