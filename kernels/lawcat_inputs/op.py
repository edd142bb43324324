"""``torch.ops.lincompile.lawcat_inputs``: schema, checks, fake. Shapes: ``docs/architecture.md``.

It appears in graphs lowered for a GPU and has no gradient: one token takes one kernel there instead of eight; several
take the ops it is defined by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..decay_gate.op import check_rate, decay_gate
from ..first_use import serving
from ..hedgehog_features.op import hedgehog_features
from ..registration import backend, without_autocast
from ..shapes import require, require_rank, require_same_device, require_shape
from . import reference
from .reference import Inputs

_SCHEMA = (
    "(Tensor q, Tensor conv_q, Tensor state_q, Tensor map_q, Tensor bias_q, Tensor k, Tensor conv_k, Tensor state_k,"
    " Tensor map_k, Tensor bias_k, Tensor x, Tensor? norm_weight, Tensor down, Tensor up, Tensor gate_bias,"
    " Tensor? mask, float eps, int kv_heads, float temperature, float? lowest)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# As ``first_use`` reads them.
_FEATURES = ("b.t.", "..", "b..", "...", "...")
_LAYOUTS = (*_FEATURES, *_FEATURES, "bt.", ".", "..", "..", ".", "bt")


def _check(given: Inputs) -> None:
    op, q, k, x, down, up = "lawcat_inputs", given.q, given.k, given.x, given.down, given.up
    for side, (tensor, conv, state, weight, bias) in (("q", given[:5]), ("k", given[5:10])):
        require_rank(op, side, tensor, "[B, H, T, D]")
        batch, heads, _, dim = tensor.shape
        require_rank(op, f"conv_{side}", conv, "[H * D, W]")
        taps = conv.shape[1]
        require_shape(op, f"conv_{side}", conv, "[H * D, W]", (heads * dim, taps))
        require_shape(op, f"state_{side}", state, "[B, H * D, W - 1]", (batch, heads * dim, taps - 1))
        maps = weight.shape[0]
        require(maps > 0 and heads % maps == 0, op, f"{heads} heads of {side} don't divide into {maps} maps")
        require_shape(op, f"map_{side}", weight, "[M, D, D]", (maps, dim, dim))
        require_shape(op, f"bias_{side}", bias, "[M, 1, D]", (maps, 1, dim))
    kv_heads, rows, mask = given.kv_heads, up.shape[0], given.mask
    require(kv_heads == k.shape[1], op, f"kv_heads must be the heads of k, {k.shape[1]}, got {kv_heads}")
    check_rate(op, given.temperature, given.lowest)
    require_shape(op, "x", x, "[B, T, C]", (q.shape[0], q.shape[2], x.shape[-1]))
    require(k.shape[0] == q.shape[0] and k.shape[2] == q.shape[2], op, "q and k must be of the same tokens")
    require_rank(op, "down", down, "[R, C]")
    require_shape(op, "down", down, "[R, C]", (down.shape[0], x.shape[2]))
    require_rank(op, "up", up, "[Hkv * F, R]")
    require(rows % kv_heads == 0, op, f"{rows} rows of up don't divide into {kv_heads} kv heads")
    require_shape(op, "up", up, "[Hkv * F, R]", (rows, down.shape[0]))
    require_shape(op, "gate_bias", given.gate_bias, "[Hkv * F]", (rows,))
    require(q.dtype == k.dtype == x.dtype == down.dtype, op, "q, k, x and down must be of one type")
    if given.norm_weight is not None:
        require_shape(op, "norm_weight", given.norm_weight, "[C]", (x.shape[2],))
    if mask is not None:
        require_shape(op, "mask", mask, "[B, T]", (q.shape[0], q.shape[2]))
        require(mask.dtype == torch.bool, op, f"mask must be bool (True = real token), got {mask.dtype}")
    others = {name: value for name, value in given._asdict().items() if isinstance(value, Tensor)}
    require_same_device(op, q, **others)


@custom_op("lincompile::lawcat_inputs", mutates_args=(), schema=_SCHEMA)
@without_autocast
def lawcat_inputs(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features ``[B, H, T, 2·D]`` and ``[B, Hkv, T, 2·D]``, log_decay ``[B, Hkv, T, F]``, both convolutions' states.

    Raises:
        ValueError: arguments that don't fit together, by name; see :class:`.reference.Inputs`.
    """
    given = Inputs(*args)
    _check(given)
    kernels = backend("lawcat_inputs", given.q)
    if kernels is not None and serving("lawcat_inputs", kernels, reference, "forward", _LAYOUTS, args, args) is kernels:
        found = kernels.forward(*args)
    else:
        found = reference.forward(*args, features=hedgehog_features, gate=decay_gate)
    feature_q, feature_k, log_decay, end_q, end_k = found
    return feature_q, feature_k, log_decay, end_q, end_k


@lawcat_inputs.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Inputs(*args)
    _check(given)
    q, k, x = given.q, given.k, given.x
    return (
        q.new_empty(*q.shape[:3], 2 * q.shape[3]),
        k.new_empty(*k.shape[:3], 2 * k.shape[3]),
        x.new_empty(x.shape[0], given.kv_heads, x.shape[1], given.up.shape[0] // given.kv_heads),
        q.new_empty(given.state_q.shape),
        k.new_empty(given.state_k.shape),
    )
