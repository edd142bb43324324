# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc"
"""Many tokens times int8 weights on Hopper, in Triton's Gluon: one product of depth 128 per group, scaled into float32.

A program takes tiles of 128 tokens by 256 weight rows, one after the other. One warp copies operands and scales into a
ring of shared memory by TMA; two groups of four warps multiply, each all tokens by half of the rows. A thread's sums of
a tile are in its registers, 128 floats; an integer product of 64 tokens by 128 rows takes 64 more, and no register of
it is written by anything but the tensor cores (the next product overwrites it without reading it): whatever touches
them in between makes the compiler wait after every instruction.

Three operations scale each integer sum, nearly as many as the scheduler can issue while the tensor cores compute it.
So what else is done per sum counts: the rows' scales lie in the order in which a thread reads them
(``triton_kernels.scale_kernel``), four in one load, and serve two products; results leave through shared memory by TMA
while the next tile is computed.
"""

from __future__ import annotations

import torch
import triton
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

from ..triton_device import processors
from . import triton_kernels as kernels
from .gluon import _barrier, _load, _reinterpret, descriptor

_put = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # Triton 3.9, then 3.6

# Of a tile; the rows of a group of warps.
TOKENS, ROWS, HALF = gl.constexpr(128), gl.constexpr(256), gl.constexpr(128)
STAGES = 3
BAND = 16  # token tiles
# float = integer · row's scale · token's scale + sum; not pure, so that the compiler leaves it between the products.
_SCALED = gl.constexpr("{ .reg .f32 v; cvt.rn.f32.s32 v, $1; mul.f32 v, v, $3; fma.rn.f32 $0, v, $2, $4; }")


@gluon.jit
def _place(tile, tiles_m, tiles_n, BAND: gl.constexpr):
    """A tile's tokens and rows. Tiles of a band of BAND token tiles come together, so that both stay in the cache."""
    per_band = BAND * tiles_n
    band = tile // per_band
    height = gl.minimum(tiles_m - band * BAND, BAND)
    return (band * BAND + (tile % per_band) % height) * TOKENS, (tile % per_band) // height * ROWS


@gluon.jit
def _copy(
    a_desc, w_desc, sa_desc, sw_desc, a_ring, w_ring, sa_ring, sw_ring, ready, free, tiles_m, tiles_n, G,
    STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    step = 0
    BYTES: gl.constexpr = (TOKENS + ROWS) * (128 + 4)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        token, row = _place(tile, tiles_m, tiles_n, BAND)
        for group in range(G):
            slot = step % STAGES
            mbarrier.wait(free.index(slot), step // STAGES & 1 ^ 1)
            barrier = ready.index(slot)
            mbarrier.expect(barrier, BYTES)
            _load(a_desc, [token, group * 128], barrier, a_ring.index(slot))
            _load(w_desc, [row, group * 128], barrier, w_ring.index(slot))
            _load(sa_desc, [group, token], barrier, sa_ring.index(slot))
            _load(sw_desc, [group, row], barrier, sw_ring.index(slot))
            step += 1


@gluon.jit
def _row_scales(sw_ring, slot, WHICH: gl.constexpr, SUMS: gl.constexpr):
    """``[1, HALF]``: the rows of a thread are pairs of neighbours, every fourth; stored side by side."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    THREAD: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        [[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]], [], [8, 2, 4, 2],
    )  # fmt: skip
    stored = _reinterpret(sw_ring.index(slot), gl.float32, [2, 8, 4, 2, 2], PLAIN).index(WHICH)
    flat = stored.permute((0, 2, 1, 3)).load(THREAD).reshape([HALF])
    return gl.expand_dims(gl.convert_layout(flat, gl.SliceLayout(0, SUMS), assert_trivial=True), 0)


@gluon.jit
def _token_scales(sa_ring, slot, PART: gl.constexpr, SUMS: gl.constexpr):
    """``[64, 1]``"""
    part = sa_ring.index(slot).reshape([TOKENS]).slice(64 * PART, 64)
    return gl.expand_dims(part.load(gl.SliceLayout(1, SUMS)), 1)


@gluon.jit
def _scaled(sums, part, token_scale, row_scale):
    token_scale, _ = gl.broadcast(token_scale, sums)
    row_scale, _ = gl.broadcast(row_scale, sums)
    return gl.inline_asm_elementwise(
        _SCALED, "=f,r,f,f,f", [part, token_scale, row_scale, sums], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _store(y_desc, room, sums, bias, token, row):
    room.store((sums + bias).to(room.dtype))
    fence_async_shared()
    _barrier()
    _put(y_desc, [token, row], room)


@gluon.jit
def _multiply(
    a_ring, w_ring, sa_ring, sw_ring, ready, free, rooms, y_desc, bias_ptr, N, tiles_m, tiles_n, G,
    WHICH: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, BIAS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """The rows' first (WHICH 0) or second half of each tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    step = 0
    zero = gl.zeros([64, HALF], gl.float32, SUMS)
    part = gl.zeros([64, HALF], gl.int32, SUMS)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        token, row = _place(tile, tiles_m, tiles_n, BAND)
        row += HALF * WHICH
        upper, lower = zero, zero
        for _group in range(G):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), step // STAGES & 1)
            weights = w_ring.index(slot).slice(HALF * WHICH, HALF, 0).permute((1, 0))
            row_scale = _row_scales(sw_ring, slot, WHICH, SUMS)
            for half in gl.static_range(2):
                token_scale = _token_scales(sa_ring, slot, half, SUMS)
                codes = a_ring.index(slot).slice(64 * half, 64, 0)
                running = warpgroup_mma(codes, weights, part, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[running])
                if half == 0:
                    upper = _scaled(upper, part, token_scale, row_scale)
                else:
                    _barrier()  # all warps have read the slot
                    mbarrier.arrive(free.index(slot), count=1)
                    lower = _scaled(lower, part, token_scale, row_scale)
            step += 1
        bias = gl.full([1, HALF], 0.0, gl.float32, SUMS)
        if BIAS:
            rows = row + gl.arange(0, HALF, gl.SliceLayout(0, SUMS))
            bias = gl.expand_dims(gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32), 0)
        tma.store_wait(0)  # of the tile before
        _barrier()
        _store(y_desc, rooms.index((2 - SHARED) * WHICH), upper, bias, token, row)
        if SHARED:
            tma.store_wait(0)
            _barrier()
        _store(y_desc, rooms.index((2 - SHARED) * WHICH + 1 - SHARED), lower, bias, token + 64, row)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N"])
def prefill_kernel(
    a_desc, w_desc, sa_desc, sw_desc, y_desc, bias_ptr, M, N, G,
    STAGES: gl.constexpr, BAND: gl.constexpr, BIAS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """``y [M, N]`` of codes ``a [M, 128·G]`` and ``w [N, …]``; what ``w`` lacks in width counts as 0.

    Scales are float32, ``sa [G, M]`` and ``sw [G, N]`` in ``scale_kernel``'s order. SHARED: two halves of a result
    leave through the same memory, since both don't fit beside the ring (float32).
    """
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES, TOKENS, 128], a_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, 128], w_desc.layout)
    sa_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, TOKENS], sa_desc.layout)
    sw_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], sw_desc.layout)
    rooms = gl.allocate_shared_memory(y_desc.dtype, [4 - 2 * SHARED, 64, HALF], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    _barrier()
    tiles_m, tiles_n = (M + TOKENS - 1) // TOKENS, (N + ROWS - 1) // ROWS
    gl.warp_specialize(
        [
            (_multiply, (a_ring, w_ring, sa_ring, sw_ring, ready, free, rooms, y_desc, bias_ptr, N, tiles_m, tiles_n, G,
                         0, STAGES, BAND, BIAS, SHARED)),
            (_multiply, (a_ring, w_ring, sa_ring, sw_ring, ready, free, rooms, y_desc, bias_ptr, N, tiles_m, tiles_n, G,
                         1, STAGES, BAND, BIAS, SHARED)),
            (_copy, (a_desc, w_desc, sa_desc, sw_desc, a_ring, w_ring, sa_ring, sw_ring, ready, free, tiles_m, tiles_n,
                     G, STAGES, BAND)),
        ],
        [4, 1], [240, 24],  # warps and registers of the second and third; the first takes what is left
    )  # fmt: skip


def launch(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor, factor: float
) -> None:
    """``y [M, N] = factor ·`` the product of int8 ``codes [≥ M, 128·G]`` and ``weight [N, ≤ 128·G]``, and the bias.

    Args:
        scale: float32 ``[G, ≥ M]``, rows of a multiple of 4.
        weight: rows of a multiple of 16 bytes.
        weight_scale: float16 ``[N, G]``.
    """
    (tokens, rows), groups = y.shape, weight_scale.shape[1]
    padded = triton.cdiv(rows, 16) * 16
    row_scale = torch.empty(groups, padded, dtype=torch.float32, device=y.device)
    kernels.scale_kernel[(triton.cdiv(padded, 128), triton.cdiv(groups, 16))](
        weight_scale, row_scale, rows, padded, groups, FACTOR=factor, BN=128, GB=16, num_warps=4
    )
    # TMA writes rows that begin at multiples of 16 bytes.
    whole = rows * y.element_size() % 16 == 0 and y.data_ptr() % 16 == 0
    out = y if whole else y.new_empty(tokens, padded)
    if weight.data_ptr() % 16 or weight.stride(0) % 16:  # a single row may have any stride
        weight = weight.clone(memory_format=torch.contiguous_format)
    tiles, chip = triton.cdiv(tokens, TOKENS.value) * triton.cdiv(rows, ROWS.value), processors(y.device)
    # So few tiles come from a first use's comparison alone; there a program goes from tile to tile, too.
    programs = min(tiles, chip) if 2 * tiles > chip else triton.cdiv(tiles, 3)
    prefill_kernel[(programs,)](
        descriptor(codes, TOKENS.value, 128), descriptor(weight, ROWS.value, 128),
        descriptor(scale, 1, TOKENS.value), descriptor(row_scale, 1, ROWS.value), descriptor(out, 64, HALF.value),
        bias, tokens, rows, groups, STAGES=STAGES, BAND=BAND, BIAS=bias is not None,
        SHARED=int(y.dtype == torch.float32), num_warps=4,
    )  # fmt: skip
    if not whole:
        y.copy_(out[:, :rows])
