"""``torch.ops.lincompile.decay_gate``: schema, checks, fake, gradient. Shapes: ``docs/architecture.md``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..first_use import serving
from ..registration import Grads, backend, gradient_fake, present, selected, without_autocast
from ..shapes import require, require_rank, require_same_device, require_shape
from . import reference

_GATE_ARGS = "Tensor z, Tensor weight, Tensor bias, Tensor? mask, int kv_heads, float temperature, float? lowest"


_LAYOUTS = ("bt.", "..", ".", "bt")  # as ``first_use`` reads them


def _check_gate(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> None:
    op = "decay_gate"
    require_rank(op, "z", z, "[B, T, R]")
    require(z.is_floating_point(), op, f"z must be float, got {z.dtype}")
    require_rank(op, "weight", weight, "[Hkv * F, R]")
    require_same_device(op, z, weight=weight, bias=bias, mask=mask)
    check_rate(op, temperature, lowest)
    rows = weight.shape[0]
    require(kv_heads > 0 and rows % kv_heads == 0, op, f"{rows} rows of weight don't divide into {kv_heads} kv heads")
    require_shape(op, "weight", weight, "[Hkv * F, R]", (rows, z.shape[2]))
    require_shape(op, "bias", bias, "[Hkv * F]", (rows,))
    if mask is not None:
        require_shape(op, "mask", mask, "[B, T]", z.shape[:2])
        require(mask.dtype == torch.bool, op, f"mask must be bool (True = real token), got {mask.dtype}")


def check_rate(op: str, temperature: float, lowest: float | None) -> None:
    """Raises ``ValueError`` for a temperature or a floor that no gate can have."""
    require(temperature > 0, op, f"temperature must be above 0, got {temperature}")
    require(lowest is None or lowest < 0, op, f"lowest must be below 0 (None = no floor), got {lowest}")


@custom_op("lincompile::decay_gate", mutates_args=(), schema=f"({_GATE_ARGS}) -> Tensor")
@without_autocast
def decay_gate(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> Tensor:
    """``log_decay [B, Hkv, T, F]`` of the low-rank gate, in z's dtype, at least ``lowest``; 0 at padded tokens."""
    args = (z, weight, bias, mask, kv_heads, temperature, lowest)
    _check_gate(*args)
    run = serving("decay_gate", backend("decay_gate", z), reference, "forward", _LAYOUTS, args, args[:3])
    out: Tensor = run.forward(*args)
    return out.contiguous()


@decay_gate.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> Tensor:
    _check_gate(z, weight, bias, mask, kv_heads, temperature, lowest)
    return z.new_empty(z.shape[0], kv_heads, z.shape[1], weight.shape[0] // kv_heads)


def _compared(few: Sequence[Any]) -> list[list[Any]]:
    """The kernels round the weight to z's type. At the floor's edge that decides whether there is a gradient at all, so
    the reference is given the rounded one, too.
    """
    grad, z, weight, *rest = few
    return [[grad, z, weight.to(z.dtype), *rest]]


@custom_op(
    "lincompile::decay_gate_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_GATE_ARGS}) -> (Tensor, Tensor, Tensor)",
)
def decay_gate_backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> tuple[Tensor, ...]:
    """Gradients of ``decay_gate`` for z, weight and bias."""
    args = (grad, z, weight, bias, mask, kv_heads, temperature, lowest)
    layouts = ("b.t.", *_LAYOUTS)
    kernels = backend("decay_gate", z)
    run = serving("decay_gate_backward", kernels, reference, "backward", layouts, args, args[1:4], forms=_compared)
    return present(run.backward(*args), z)


@decay_gate_backward.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    temperature: float,
    lowest: float | None,
) -> tuple[Tensor, ...]:
    return gradient_fake(z, weight, bias)


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gate_backward(ctx: Any, grad: Tensor) -> Grads:
    return selected(decay_gate_backward(grad, *ctx.saved_tensors, *ctx.options), ctx.needs_input_grad)


decay_gate.register_autograd(_gate_backward, setup_context=_gate_setup)
