"""Six-bit codes in two byte planes: the storage format of ``int6_linear``.

A code ``c ∈ [−32, 31]`` is stored as ``u = c + 32 = 4·hi + lo`` with ``hi ∈ [0, 15]`` in the nibble plane and
``lo ∈ [0, 3]`` in the two-bit plane. Both planes are split into the groups of ``group_size`` input features that share
a scale; group ``g`` of a row starts at byte ``g · group_size/2`` of ``weight_hi`` and ``g · group_size/4`` of
``weight_lo``.

**Order inside a group of L codes, L divisible by 4** (every full group, and a partial last group such as the 64 codes
that end a row of K = 576). Let ``Q = L/4``; the group is four slices of Q consecutive codes, so that a kernel turns
one load of each plane into four contiguous operands with one mask and shift each. For ``j ∈ [0, Q)``::

    hi[j]     = hi(c[j])       |  hi(c[Q + j])  << 4
    hi[Q + j] = hi(c[2Q + j])  |  hi(c[3Q + j]) << 4
    lo[j]     = lo(c[j])  |  lo(c[Q + j]) << 2  |  lo(c[2Q + j]) << 4  |  lo(c[3Q + j]) << 6

**A partial last group with L not divisible by 4** is stored in plain order, its unused high bits zero::

    hi[i] = hi(c[2i]) | hi(c[2i+1]) << 4          lo[i] = lo(c[4i]) | … | lo(c[4i+3]) << 6

Use :func:`unpack` to re-pack for another runtime; nothing else needs to know this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZE = 128
CODE_MIN, CODE_MAX = -32, 31
_OFFSET = 32


def plane_bytes(in_features: int) -> tuple[int, int]:
    """Bytes per row of the nibble plane and of the two-bit plane for ``in_features`` codes."""
    return (in_features + 1) // 2, (in_features + 3) // 4


def group_count(in_features: int, group_size: int) -> int:
    """Number of scales per row; the last group may be partial."""
    return (in_features + group_size - 1) // group_size


def check_group_size(group_size: int) -> None:
    """Raise ``ValueError`` unless ``group_size`` is a positive multiple of 32 (four slices of whole 8-byte words)."""
    if group_size <= 0 or group_size % 32:
        raise ValueError(f"int6 group_size must be a positive multiple of 32, got {group_size}")


def pack(codes: Tensor, group_size: int = GROUP_SIZE) -> tuple[Tensor, Tensor]:
    """Pack signed six-bit codes into the two planes.

    Args:
        codes: int8 ``[N, K]``, every value in ``[−32, 31]``.
        group_size: input features per scale.

    Returns:
        ``weight_hi`` uint8 ``[N, ceil(K/2)]`` and ``weight_lo`` uint8 ``[N, ceil(K/4)]``, on the codes' device.

    Raises:
        ValueError: wrong dtype, rank or group size, or a code out of range (it would alias another weight).
    """
    check_group_size(group_size)
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"int6 codes must be int8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and (int(codes.min()) < CODE_MIN or int(codes.max()) > CODE_MAX):
        low, high = int(codes.min()), int(codes.max())
        raise ValueError(f"int6 codes must lie in [{CODE_MIN}, {CODE_MAX}], got {low} … {high}")
    rows, in_features = codes.shape
    if not codes.numel():
        hi_bytes, lo_bytes = plane_bytes(in_features)
        return codes.new_empty((rows, hi_bytes), dtype=torch.uint8), codes.new_empty(
            (rows, lo_bytes), dtype=torch.uint8
        )
    unsigned = (codes + _OFFSET).view(torch.uint8)
    full = in_features // group_size * group_size
    parts = [_pack_sliced(unsigned[:, :full].reshape(-1, group_size), rows)] if full else []
    if full < in_features:
        tail = unsigned[:, full:]
        parts.append(_pack_sliced(tail, rows) if tail.shape[1] % 4 == 0 else _pack_plain(tail))
    return torch.cat([hi for hi, _ in parts], dim=1), torch.cat([lo for _, lo in parts], dim=1)


def unpack(weight_hi: Tensor, weight_lo: Tensor, in_features: int, group_size: int = GROUP_SIZE) -> Tensor:
    """Inverse of :func:`pack`: int8 codes ``[N, in_features]`` in ordinary input-feature order.

    Raises:
        ValueError: the planes' widths don't belong to ``in_features``.
    """
    check_group_size(group_size)
    if (weight_hi.shape[1], weight_lo.shape[1]) != plane_bytes(in_features):
        raise ValueError(
            f"int6 planes of {weight_hi.shape[1]} and {weight_lo.shape[1]} bytes per row don't hold {in_features} codes"
            f" (expected {plane_bytes(in_features)})"
        )
    rows = weight_hi.shape[0]
    codes = torch.empty(rows, in_features, dtype=torch.int8, device=weight_hi.device)
    full = in_features // group_size * group_size
    if full:
        top = unpack_top_bits(
            torch.unflatten(weight_hi[:, : full // 2], 1, (full // group_size, group_size // 2)),
            torch.unflatten(weight_lo[:, : full // 4], 1, (full // group_size, group_size // 4)),
        )
        codes[:, :full] = (top >> 2).flatten(1)
    tail = in_features - full
    if tail and tail % 4 == 0:
        codes[:, full:] = unpack_top_bits(weight_hi[:, full // 2 :], weight_lo[:, full // 4 :]) >> 2
    elif tail:
        codes[:, full:] = _unpack_plain(weight_hi[:, full // 2 :], weight_lo[:, full // 4 :])[:, :tail]
    return codes


def unpack_top_bits(hi: Tensor, lo: Tensor) -> Tensor:
    """Unpack groups in sliced order to ``4·c`` as int8, the six bits on top so that the sign costs nothing.

    Args:
        hi: uint8 ``[…, L/2]`` and lo: uint8 ``[…, L/4]``: one group in the last dimension.

    Returns:
        int8 ``[…, L]``, equal to four times the code.
    """
    quarter = lo.shape[-1]
    hi = torch.unflatten(hi, -1, (2, quarter))
    out = torch.empty(*lo.shape[:-1], 2, 2, quarter, dtype=torch.uint8, device=hi.device)
    word = torch.int64 if quarter % 8 == 0 and _word_aligned(hi) and _word_aligned(lo) else torch.uint8
    hi, lo, words = hi.view(word), lo.view(word), out.view(word)
    # Eight codes to a word. Pairs of slices (0, 2) and (1, 3) share their nibbles' position, so each pair is one pass.
    low_bits = torch.empty_like(hi)
    for odd, shifts in enumerate(((-2, 2), (0, 4))):
        for pair, shift in enumerate(shifts):
            low_bits[..., pair, :] = lo >> shift if shift >= 0 else lo << -shift
        low_bits &= _every_byte(0x0C, word)
        nibbles = hi & _every_byte(0xF0, word) if odd else (hi << 4) & _every_byte(0xF0, word)
        # u = c + 32 sits in the top six bits: flipping the top bit subtracts 32 from it.
        torch.bitwise_xor(nibbles | low_bits, _every_byte(0x80, word), out=words[..., odd, :])
    return out.view(torch.int8).flatten(-3)


def _word_aligned(plane: Tensor) -> bool:
    return plane.storage_offset() % 8 == 0 and plane.stride(-1) == 1 and all(s % 8 == 0 for s in plane.stride()[:-1])


def _every_byte(value: int, word: torch.dtype) -> int:
    """``value`` in each byte of a word, as that (signed) word."""
    return int.from_bytes(bytes([value]) * word.itemsize, "little", signed=word.is_signed)


def _pack_sliced(groups: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    slices = torch.unflatten(groups, 1, (4, groups.shape[1] // 4))
    high, low = slices >> 2, slices & 3
    hi = torch.cat([high[:, 0] | high[:, 1] << 4, high[:, 2] | high[:, 3] << 4], dim=1)
    lo = low[:, 0] | low[:, 1] << 2 | low[:, 2] << 4 | low[:, 3] << 6
    return hi.reshape(rows, -1), lo.reshape(rows, -1)


def _pack_plain(tail: Tensor) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(tail, (0, -tail.shape[1] % 4))
    high, low = torch.unflatten(padded >> 2, 1, (-1, 2)), torch.unflatten(padded & 3, 1, (-1, 4))
    hi = (high[..., 0] | high[..., 1] << 4)[:, : (tail.shape[1] + 1) // 2]
    return hi, low[..., 0] | low[..., 1] << 2 | low[..., 2] << 4 | low[..., 3] << 6


def _unpack_plain(hi: Tensor, lo: Tensor) -> Tensor:
    high = torch.stack([hi & 15, hi >> 4], dim=-1).flatten(1)
    low = torch.stack([lo >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)[:, : high.shape[1]]
    return (high << 2 | low).view(torch.int8) - _OFFSET
