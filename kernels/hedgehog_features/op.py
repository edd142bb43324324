"""``torch.ops.lincompile.hedgehog_features``: schema, checks, fake, gradient. Shapes: ``docs/architecture.md``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..first_use import serving
from ..registration import Grads, backend, selected, without_autocast
from ..shapes import require, require_rank, require_same_device, require_shape
from . import reference

_FEATURE_ARGS = (
    "Tensor x, Tensor? conv_weight, Tensor? initial_state, Tensor weight, Tensor bias, Tensor? mask, bool mask_output"
)


_LAYOUTS = ("b.t.", "..", "b..", "...", "...", "bt")  # as ``first_use`` reads them


def _check_features(
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
) -> None:
    op = "hedgehog_features"
    require_rank(op, "x", x, "[B, H, T, D]")
    require(x.is_floating_point(), op, f"x must be float, got {x.dtype}")
    require_rank(op, "weight", weight, "[M, D, D]")
    require_same_device(
        op, x, conv_weight=conv_weight, initial_state=initial_state, weight=weight, bias=bias, mask=mask
    )
    batch, heads, length, dim = x.shape
    maps = weight.shape[0]
    require(maps > 0 and heads % maps == 0, op, f"{heads} heads don't divide into {maps} maps")
    require_shape(op, "weight", weight, "[M, D, D]", (maps, dim, dim))
    require_shape(op, "bias", bias, "[M, 1, D]", (maps, 1, dim))
    require(conv_weight is not None or initial_state is None, op, "initial_state needs a conv_weight")
    if conv_weight is not None:
        require_rank(op, "conv_weight", conv_weight, "[H * D, W]")
        taps = conv_weight.shape[1]
        require(taps > 0, op, "conv_weight needs at least one tap (W >= 1)")
        require_shape(op, "conv_weight", conv_weight, "[H * D, W]", (heads * dim, taps))
        if initial_state is not None:
            require_shape(op, "initial_state", initial_state, "[B, H * D, W - 1]", (batch, heads * dim, taps - 1))
    if mask is not None:
        require_shape(op, "mask", mask, "[B, T]", (batch, length))
        require(mask.dtype == torch.bool, op, f"mask must be bool (True = real token), got {mask.dtype}")


def _layout(x: Tensor) -> Tensor:
    """Memory for x's gradient: ``[B, T, H, D]``, as projections write x, seen as ``[B, H, T, D]``."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@custom_op(
    "lincompile::hedgehog_features", mutates_args=(), schema=f"({_FEATURE_ARGS}) -> (Tensor features, Tensor state)"
)
@without_autocast
def hedgehog_features(
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, Tensor]:
    """Convolution, map and both softmaxes in one pass; returns ``[B, H, T, 2 · D]`` and the convolution's state."""
    _check_features(x, conv_weight, initial_state, weight, bias, mask)
    args = (x, conv_weight, initial_state, weight, bias, mask, mask_output)
    kernels = backend("hedgehog_features", x)
    run = serving("hedgehog_features", kernels, reference, "forward", _LAYOUTS, args, args[:5])
    features, state = run.forward(*args)
    return features.contiguous(), state


@hedgehog_features.register_fake
def _(
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, Tensor]:
    _check_features(x, conv_weight, initial_state, weight, bias, mask)
    batch, heads, length, dim = x.shape
    taps = 1 if conv_weight is None else conv_weight.shape[1]
    return x.new_empty(batch, heads, length, 2 * dim), x.new_empty(batch, heads * dim, taps - 1)


@custom_op(
    "lincompile::hedgehog_features_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_state, {_FEATURE_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def hedgehog_features_backward(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, ...]:
    """Gradients of ``hedgehog_features`` for x, conv_weight, initial_state, weight and bias (empty where absent)."""
    args = (grad, grad_state, x, conv_weight, initial_state, weight, bias, mask, mask_output)
    layouts = ("b.t.", "b..", *_LAYOUTS)
    kernels = backend("hedgehog_features", x)
    run = serving("hedgehog_features_backward", kernels, reference, "backward", layouts, args, args[2:7])
    d_x, *rest = run.backward(*args)
    own = _layout(x)
    if d_x.stride() != own.stride():
        d_x = own.copy_(d_x)
    return d_x, *(x.new_empty(0) if grad is None else grad.contiguous() for grad in rest)


@hedgehog_features_backward.register_fake
def _(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_output: bool,
) -> tuple[Tensor, ...]:
    rest = (conv_weight, initial_state, weight, bias)
    return _layout(x), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest)


def _features_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.mask_output = inputs[6]


def _features_backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> Grads:
    grads = hedgehog_features_backward(grad, grad_state, *ctx.saved_tensors, ctx.mask_output)
    return selected(grads, ctx.needs_input_grad)


hedgehog_features.register_autograd(_features_backward, setup_context=_features_setup)
