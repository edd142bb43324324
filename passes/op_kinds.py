"""Which ATen ops are elementwise, casts, comparisons …: the tables by which graphs are read."""

from __future__ import annotations

from typing import Any

import torch

from .graph import aten

ELEMENTWISE_OF_SCORES = frozenset(
    {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.neg.default,
        aten.tanh.default,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.maximum.default,
        aten.minimum.default,
        aten.max.other,
        aten.min.other,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.nan_to_num.default,
    }
)
CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
        aten.to.other,
    }
)
SAME = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.dropout.default,
    }
)
COMPARISONS = frozenset(
    getattr(getattr(aten, name), kind) for name in ("lt", "le", "gt", "ge", "eq", "ne") for kind in ("Scalar", "Tensor")
)
SUMS: dict[Any, int] = {
    aten.add.Tensor: 1,
    aten.add.Scalar: 1,
    aten.sub.Tensor: -1,
    aten.sub.Scalar: -1,
}
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
FILLED = frozenset({aten.full.default, aten.new_full.default, aten.full_like.default})
ONES = frozenset({aten.ones.default, aten.new_ones.default, aten.ones_like.default})
ZEROS = frozenset({aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default})
# Each output element depends on the same elements of the inputs, whatever the length.
POINTWISE = ELEMENTWISE_OF_SCORES | frozenset(
    {
        aten.__and__.Tensor,
        aten.__or__.Tensor,
        aten.__xor__.Tensor,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.bitwise_xor.Tensor,
        aten.bitwise_not.default,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_xor.default,
        aten.logical_not.default,
        aten.where.Scalar,
        aten.rsub.Scalar,
        aten.rsub.Tensor,
    }
)
# Linear in their values, besides sums and products with constants.
LINEAR = frozenset(
    {
        aten.neg.default,
        aten.rsub.Scalar,
        aten.rsub.Tensor,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
    }
)
JOINS = frozenset({aten.cat.default, aten.concat.default, aten.stack.default})
# Elementwise too, but what they do to positions isn't followed: such masks are known only where they are looked at.
OPAQUE_POINTWISE = frozenset(
    {
        aten.abs.default,
        aten.log.default,
        aten.log2.default,
        aten.exp.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.reciprocal.default,
        aten.floor.default,
        aten.ceil.default,
        aten.round.default,
        aten.trunc.default,
        aten.sign.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.sin.default,
        aten.cos.default,
        aten.square.default,
        aten.pow.Tensor_Scalar,
        aten.pow.Scalar,
        aten.pow.Tensor_Tensor,
        aten.clamp_max.default,
        aten.clamp.Tensor,
        aten.floor_divide.default,
        aten.div.Tensor_mode,
        aten.div.Scalar_mode,
        aten.remainder.Scalar,
        aten.remainder.Tensor,
        aten.fmod.Scalar,
        aten.fmod.Tensor,
        aten.isinf.default,
        aten.isnan.default,
        aten.bitwise_and.Scalar,
        aten.bitwise_or.Scalar,
        aten.bitwise_xor.Scalar,
        aten.__rshift__.Scalar,
        aten.__lshift__.Scalar,
        aten.bitwise_right_shift.Tensor_Scalar,
        aten.bitwise_left_shift.Tensor_Scalar,
        aten.embedding.default,
        aten.index_select.default,
    }
)


def is_pointwise(target: Any) -> bool:
    """Whether each output element depends on the same elements of the inputs alone, by torch's word or the tables.

    Look-ups count as well (OPAQUE_POINTWISE): ask about their axes first.
    """
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags or target in POINTWISE | OPAQUE_POINTWISE | COMPARISONS | CASTS | SAME
