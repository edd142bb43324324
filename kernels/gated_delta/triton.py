# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The scans of the gated delta rule on a GPU: what ``reference.Scans`` does chunk by chunk, in one kernel each way.

Within chunks everything is a handful of large batched products, which torch does well; from chunk to chunk there are
two small products that depend on the ones before, which as torch ops cost four launches a chunk. Here a program keeps
``BV`` columns of one head's state on the chip and walks over the chunks. All in float32, products as three of TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launcher
from ..triton_device import COUNTS, INTERPRETED, shared_memory

SHARED_MEMORY = 200 * 1024


@triton.jit
def load_tile(base, rows, cols, height, width):
    """A ``[height, width]`` matrix, zero outside."""
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    return tl.load(base + rows[:, None] * width + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, tile, rows, cols, height, width):
    """The inverse of ``load_tile``."""
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    tl.store(base + rows[:, None] * width + cols[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def forward_scan(
    start, u_local, w, k_out, whole, states, u, N, C, D, DV,
    BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """States before each chunk and after the last ``[BG, N + 1, D, DV]``, and ``u [BG, N, C, DV]``."""
    problem = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    tokens, keys = tl.arange(0, BC), tl.arange(0, BD)
    state = load_tile(start + problem * D * DV, keys, cols, D, DV)
    for n in range(N):
        slot = problem * N + n
        store_tile(states + (problem * (N + 1) + n) * D * DV, state, keys, cols, D, DV)
        ws, ks = load_tile(w + slot * C * D, tokens, keys, C, D), load_tile(k_out + slot * C * D, tokens, keys, C, D)
        us = load_tile(u_local + slot * C * DV, tokens, cols, C, DV) - tl.dot(ws, state, input_precision="tf32x3")
        store_tile(u + slot * C * DV, us, tokens, cols, C, DV)
        state = tl.load(whole + slot) * state + tl.dot(tl.trans(ks), us, input_precision="tf32x3")
    store_tile(states + (problem * (N + 1) + N) * D * DV, state, keys, cols, D, DV)


@triton.jit(do_not_specialize=COUNTS)
def backward_scan(
    d_end, d_u_local, d_before, w, k_out, whole, d_u, after, d_start, N, C, D, DV,
    BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """``d_u [BG, N, C, DV]``, the gradients of the states after each chunk ``[BG, N, D, DV]`` and of the first."""
    problem = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    tokens, keys = tl.arange(0, BC), tl.arange(0, BD)
    slopes = load_tile(d_end + problem * D * DV, keys, cols, D, DV)
    for step in range(N):
        slot = problem * N + (N - 1 - step)
        store_tile(after + slot * D * DV, slopes, keys, cols, D, DV)
        ws, ks = load_tile(w + slot * C * D, tokens, keys, C, D), load_tile(k_out + slot * C * D, tokens, keys, C, D)
        us = load_tile(d_u_local + slot * C * DV, tokens, cols, C, DV) + tl.dot(ks, slopes, input_precision="tf32x3")
        store_tile(d_u + slot * C * DV, us, tokens, cols, C, DV)
        read = load_tile(d_before + slot * D * DV, keys, cols, D, DV)
        slopes = tl.load(whole + slot) * slopes + read - tl.dot(tl.trans(ws), us, input_precision="tf32x3")
    store_tile(d_start + problem * D * DV, slopes, keys, cols, D, DV)


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> bool:
    """Whether these kernels serve a call: no float64, keys up to 128 wide, two tokens or more, enough shared memory."""
    given = [x for x in (q, k, v, *rest) if x is not None]
    return (
        all(x.dtype != torch.float64 for x in given)
        and k.shape[2] > 1
        and min(q.shape) > 0
        and min(v.shape) > 0
        and k.shape[3] <= 128
        and shared_memory(q.device) >= SHARED_MEMORY
    )


def _blocks(w: Tensor, columns: int) -> dict[str, int]:
    least = 16 if INTERPRETED else 64
    return {
        "BC": max(least, triton.next_power_of_2(w.shape[3])),
        "BD": max(least, triton.next_power_of_2(w.shape[4])),
        "BV": min(64, max(least, triton.next_power_of_2(columns))),
        "num_warps": 4 if w.shape[4] <= 64 else 8,
        "num_stages": 2 if w.shape[4] <= 64 else 1,
    }


def scan_forward(state: Tensor, u_local: Tensor, w: Tensor, k_out: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.scan_forward``; float32."""
    batch, groups, chunks, size, width = w.shape
    columns = u_local.shape[-1]
    states = state.new_empty(batch, groups, chunks + 1, width, columns)
    u = state.new_empty(u_local.shape)
    blocks = _blocks(w, columns)
    launcher(forward_scan, (triton.cdiv(columns, blocks["BV"]), batch * groups))(
        state.contiguous(), u_local.contiguous(), w.contiguous(), k_out.contiguous(), whole.contiguous(), states, u,
        chunks, size, width, columns, **blocks,
    )  # fmt: skip
    return states, u


def scan_backward(
    d_state: Tensor, d_u_local: Tensor, d_before: Tensor, w: Tensor, k_out: Tensor, whole: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.scan_backward``; float32."""
    batch, groups, chunks, size, width = w.shape
    columns = d_u_local.shape[-1]
    d_u, after, d_start = (d_state.new_empty(x.shape) for x in (d_u_local, d_before, d_state))
    blocks = _blocks(w, columns)
    launcher(backward_scan, (triton.cdiv(columns, blocks["BV"]), batch * groups))(
        d_state.contiguous(), d_u_local.contiguous(), d_before.contiguous(), w.contiguous(), k_out.contiguous(),
        whole.contiguous(), d_u, after, d_start, chunks, size, width, columns, **blocks,
    )  # fmt: skip
    return d_u, after, d_start
