"""``torch.ops.lincompile.short_conv``: schema, checks, fake, gradient. Shapes: ``docs/architecture.md``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..first_use import serving
from ..registration import Grads, backend, gradient_fake, present, selected
from ..shapes import require, require_rank, require_same_device, require_shape
from . import reference

_LAYOUTS = ("bt.", "..", "b..")  # as ``first_use`` reads them


def _check_conv(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> None:
    op = "short_conv"
    require_rank(op, "x", x, "[B, T, C]")
    require_rank(op, "weight", weight, "[C, W]")
    require_same_device(op, x, weight=weight, initial_state=initial_state)
    require_shape(op, "weight", weight, "[C, W]", (x.shape[2], weight.shape[1]))
    require(weight.shape[1] > 0, op, "weight needs at least one tap (W >= 1)")
    if initial_state is not None:
        expected = (x.shape[0], x.shape[2], weight.shape[1] - 1)
        require_shape(op, "initial_state", initial_state, "[B, C, W - 1]", expected)


@custom_op(
    "lincompile::short_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? initial_state) -> (Tensor y, Tensor final_state)",
)
def short_conv(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution; returns ``y [B, T, C]`` and the last inputs ``[B, C, W - 1]``, in x's dtype."""
    _check_conv(x, weight, initial_state)
    args = (x, weight, initial_state)
    run = serving("short_conv", backend("short_conv", x), reference, "forward", _LAYOUTS, args, args)
    y, state = run.forward(*args)
    return y, state


@short_conv.register_fake
def _(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_conv(x, weight, initial_state)
    return torch.empty_like(x).contiguous(), x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)


@custom_op(
    "lincompile::short_conv_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor grad_state, Tensor x, Tensor weight, Tensor? initial_state)"
    " -> (Tensor, Tensor, Tensor)",
)
def short_conv_backward(
    grad_y: Tensor, grad_state: Tensor, x: Tensor, weight: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of ``short_conv`` for x, weight and initial_state (empty where absent)."""
    args = (grad_y, grad_state, x, weight, initial_state)
    layouts = ("bt.", "b..", *_LAYOUTS)
    kernels = backend("short_conv", x)
    run = serving("short_conv_backward", kernels, reference, "backward", layouts, args, args[2:])
    return present(run.backward(*args), x)


@short_conv_backward.register_fake
def _(
    grad_y: Tensor, grad_state: Tensor, x: Tensor, weight: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, ...]:
    return gradient_fake(x, weight, initial_state)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _conv_backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> Grads:
    return selected(short_conv_backward(grad_y, grad_state, *ctx.saved_tensors), ctx.needs_input_grad)


short_conv.register_autograd(_conv_backward, setup_context=_conv_setup)
