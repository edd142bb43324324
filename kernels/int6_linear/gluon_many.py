# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc"
"""``int6_linear`` for many tokens on Hopper, in Triton's Gluon.

Unpacked weights and activation codes arrive by TMA, a ring of groups ahead. The integer product is taken in chunks of
rows, so that only one chunk's 32-bit sums are in registers beside the float32 ones. Sums inside a group are exact
integers; groups are added in float32.
"""

from __future__ import annotations

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

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, then 3.9
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # likewise


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
