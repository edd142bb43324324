"""``torch.ops.lincompile.int6_embedding``: rows of a table packed in six bits, looked up and made float.

The planes are those of :mod:`.pack`, so that one copy serves a table and an output head tied to it. The table is
frozen: nothing here has a gradient. On a GPU one kernel makes the rows (groups of 128, K a multiple of 4, results of at
most 32 bits) where Triton can be imported and it is right on its first use; else the plain ops do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..first_use import trusted
from ..registration import backend
from ..shapes import require
from .codes import dequantize
from .pack import group_count, plane_bytes, unpack


def _check(ids: Tensor, hi: Tensor, lo: Tensor, scale: Tensor, in_features: int, group_size: int) -> None:
    op = "int6_embedding"
    require(ids.dtype in (torch.int64, torch.int32), op, f"ids must be integers, got {ids.dtype}")
    require(group_size > 0 and group_size % 32 == 0, op, f"group_size must be a multiple of 32, got {group_size}")
    columns = (*plane_bytes(in_features), group_count(in_features, group_size))
    found = (hi.shape[-1], lo.shape[-1], scale.shape[-1])
    require(
        found == columns and hi.shape[0] == lo.shape[0] == scale.shape[0],
        op,
        f"planes and scales of widths {found} don't hold rows of {in_features} features (expected {columns})",
    )


@custom_op(
    "lincompile::int6_embedding",
    mutates_args=(),
    schema="(Tensor ids, Tensor weight_hi, Tensor weight_lo, Tensor weight_scale, int in_features, int group_size,"
    " ScalarType dtype) -> Tensor",
)
def int6_embedding(
    ids: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Rows of a packed table.

    Args:
        ids: int64 or int32 ``[…]``, each in ``[0, V)``.
        weight_hi: uint8 ``[V, ceil(K/2)]``.
        weight_lo: uint8 ``[V, ceil(K/4)]``.
        weight_scale: float16 ``[V, ceil(K/group_size)]``.
        in_features: K.
        group_size: features per scale.
        dtype: of the result.

    Returns:
        ``[…, K]``.

    Raises:
        IndexError: an id outside the table (on a GPU: a device-side assertion, as for an ordinary embedding).
        ValueError: shapes or dtypes that don't fit.
    """
    _check(ids, weight_hi, weight_lo, weight_scale, in_features, group_size)
    args = (ids.flatten(), weight_hi, weight_lo, weight_scale, in_features, group_size, dtype)
    kernels = backend("int6_linear", weight_hi, "triton_embedding")
    lookup = plain
    # Some ids are compared; the table, which they are rows of, stays whole.
    if kernels is not None and kernels.supports(*args) and trusted(
        "int6_embedding", kernels.lookup, _exact, ("t", "..", "..", ".."), args, together=False
    ):  # fmt: skip
        lookup = kernels.lookup
    return lookup(*args).view(*ids.shape, in_features)


def plain(
    ids: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The definition: rows ``[n, K]`` of the planes are looked up, then made float. ``ids [n]``."""
    # index_select, unlike indexing, refuses negative ids
    hi, lo, scale = (part.index_select(0, ids) for part in (weight_hi, weight_lo, weight_scale))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return dequantize(unpack(hi, lo, in_features, group_size), scale, group_size, compute).to(dtype)


def _exact(*args: Any) -> Tensor:
    """:func:`plain` without the last rounding."""
    ids, hi, lo, scale, in_features, group_size, _ = args
    return plain(ids, hi, lo, scale, in_features, group_size, torch.float64)


@int6_embedding.register_fake
def _(
    ids: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(ids, weight_hi, weight_lo, weight_scale, in_features, group_size)
    return weight_scale.new_empty(*ids.shape, in_features, dtype=dtype)
