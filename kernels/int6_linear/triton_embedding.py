# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Rows of a table packed in six bits, looked up and made float by one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_device import INTERPRETED, chained
from .pack import GROUP_SIZE

WIDEST = 1024  # channels of one program


@triton.jit(do_not_specialize=["V"])
def embedding_kernel(
    ids_ptr, hi_ptr, lo_ptr, scale_ptr, out_ptr, V, K, HI_BYTES, LO_BYTES, G,
    TAIL: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BK channels of one id's row; a group of L codes is four slices of L/4 (:mod:`.pack`)."""
    place = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = channel < K
    group, inner = channel // 128, channel % 128
    quarter = tl.full([BK], 32, tl.int32)
    if TAIL:
        quarter = tl.where(channel < K - TAIL, 32, TAIL // 4)
    part, byte = inner // quarter, inner % quarter
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(ids_ptr + place).to(tl.int64)
    tl.device_assert((row >= 0) & (row < V), "int6_embedding: an id outside the table")
    nibbles = tl.load(hi_ptr + row * HI_BYTES + (group * 64 + part // 2 * quarter + byte), mask=inside, other=0)
    bits = tl.load(lo_ptr + row * LO_BYTES + (group * 32 + byte), mask=inside, other=0)
    scale = tl.load(scale_ptr + row * G + group, mask=inside, other=0.0).to(tl.float32)
    high, low = nibbles.to(tl.int32) >> part % 2 * 4 & 15, bits.to(tl.int32) >> part * 2 & 3
    value = (high * 4 + low - 32).to(tl.float32) * scale  # exact: 6 and 11 significant bits
    tl.store(out_ptr + place * K + channel, value.to(out_ptr.dtype.element_ty), mask=inside)


def supports(
    ids: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int,
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether the kernel serves a call: at least one id, groups of 128, K a multiple of 4 (a partial group in four
    slices), a result in float32, float16 or bfloat16.
    """
    narrow = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return narrow and group_size == GROUP_SIZE and in_features % 4 == 0 and ids.numel() > 0 < in_features


def lookup(
    ids: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See :func:`.embedding.plain`; for calls that ``supports`` accepts.

    An id outside the table is a device-side assertion: the kernel is compiled with assertions, but without Triton's
    own for integers that overflow.
    """
    ids, hi, lo, scale = (tensor.contiguous() for tensor in (ids, weight_hi, weight_lo, weight_scale))
    out = torch.empty(ids.shape[0], in_features, dtype=dtype, device=ids.device)
    block = min(WIDEST, triton.next_power_of_2(in_features))
    asserting = {} if INTERPRETED else {"debug": True, "sanitize_overflow": False}
    embedding_kernel[(ids.shape[0], triton.cdiv(in_features, block))](
        ids, hi, lo, scale, out, hi.shape[0], in_features, hi.shape[1], lo.shape[1], scale.shape[1],
        TAIL=in_features % GROUP_SIZE, BK=block, num_warps=4, **asserting, **chained(ids.device),
    )  # fmt: skip
    return out
