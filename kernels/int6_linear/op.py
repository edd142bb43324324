"""``torch.ops.lincompile.int6_linear`` and ``int8_linear``: schemas, checks, fakes, gradients.

Importing this module registers them; it needs torch only. Weights are frozen: gradients flow to ``x`` (rounding of the
activations passes them straight through) and to ``bias``. Shapes: ``docs/architecture.md``; codes: :mod:`.pack`.

CPU tensors run the C kernel of :mod:`.cpu` for up to 16 tokens, otherwise the reference. CUDA tensors run the Triton
kernels for the calls those support (groups of 128, K a multiple of 16, ``a6`` or ``a8``, inputs of at most 32 bits)
where Triton can be imported and that are right on their first use, otherwise the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..registration import backend, without_autocast
from ..shapes import require
from . import cpu, reference
from .codes import ACTIVATIONS
from .pack import group_count, plane_bytes


def _check(
    op: str, x: Tensor, codes: dict[str, tuple[Tensor, int, torch.dtype]], scale: Tensor, bias: Tensor | None,
    group_size: int, activation: str,
) -> None:  # fmt: skip
    # Messages are written only for what is wrong: a layer's check must cost little beside a layer of one token.
    if group_size <= 0 or group_size % 32:
        require(False, op, f"group_size must be a multiple of 32, got {group_size}")
    if activation not in ACTIVATIONS:
        require(False, op, f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point() or not x.dim():
        require(False, op, f"x must be float [..., K], got {x.dtype} {list(x.shape)}")
    rows, in_features = scale.shape[0], x.shape[-1]
    buffers = codes | {"weight_scale": (scale, group_count(in_features, group_size), torch.float16)}
    for name, (tensor, columns, dtype) in buffers.items():
        if tensor.dtype != dtype or tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape[1] != columns:
            expected = f"{dtype} {[rows, columns]} for K = {in_features} and groups of {group_size}"
            require(False, op, f"{name} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != x.device:
            require(False, op, f"{name} is on {tensor.device}, x on {x.device}")
    if bias is not None:
        require(bias.dim() == 1 and bias.shape[0] == rows, op, f"bias must be [{rows}], got {list(bias.shape)}")


def check_int6(
    x: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int,
    activation: str,
) -> None:  # fmt: skip
    """``ValueError`` where the planes, scales, bias or options of a six-bit layer don't fit x ``[…, K]``."""
    hi_bytes, lo_bytes = plane_bytes(x.shape[-1])
    codes = {"weight_hi": (weight_hi, hi_bytes, torch.uint8), "weight_lo": (weight_lo, lo_bytes, torch.uint8)}
    _check("int6_linear", x, codes, weight_scale, bias, group_size, activation)


@custom_op(
    "lincompile::int6_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight_hi, Tensor weight_lo, Tensor weight_scale, Tensor? bias, int group_size,"
    " str activation) -> Tensor",
)
@without_autocast
def int6_linear(
    x: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int,
    activation: str,
) -> Tensor:  # fmt: skip
    """Linear layer with packed six-bit weights: ``[…, K]`` → ``[…, N]`` in x's dtype."""
    check_int6(x, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
    kernels = backend("int6_linear", x)
    if kernels is not None and kernels.supports(x, group_size, activation):
        y: Tensor = kernels.int6_linear(x, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
        return y
    if x.device.type == "cpu" and cpu.supports(x, group_size, activation):
        return cpu.int6_linear(x, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
    return reference.int6_linear(x, weight_hi, weight_lo, weight_scale, bias, group_size, activation)


@int6_linear.register_fake
def _(
    x: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int,
    activation: str,
) -> Tensor:  # fmt: skip
    check_int6(x, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
    return x.new_empty(*x.shape[:-1], weight_hi.shape[0])


@custom_op(
    "lincompile::int6_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight_hi, Tensor weight_lo, Tensor weight_scale, int in_features, int group_size)"
    " -> Tensor",
)
@without_autocast
def int6_linear_backward(
    grad: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int
) -> Tensor:
    """Gradient of ``int6_linear`` for x: ``grad […, N] @ dequantized weight [N, K]``."""
    return reference.int6_linear_input_grad(grad, weight_hi, weight_lo, weight_scale, in_features, group_size)


@int6_linear_backward.register_fake
def _(
    grad: Tensor, weight_hi: Tensor, weight_lo: Tensor, weight_scale: Tensor, in_features: int, group_size: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _int6_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_hi, weight_lo, weight_scale, _, ctx.group_size, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(weight_hi, weight_lo, weight_scale)


def _int6_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = int6_linear_backward(grad, *ctx.saved_tensors, ctx.in_features, ctx.group_size)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, None, grad_bias, None, None


int6_linear.register_autograd(_int6_backward, setup_context=_int6_setup)


def _check_int8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str
) -> None:
    codes = {"weight": (weight, x.shape[-1], torch.int8)}
    _check("int8_linear", x, codes, weight_scale, bias, group_size, activation)


@custom_op(
    "lincompile::int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int group_size, str activation) -> Tensor",
)
@without_autocast
def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str
) -> Tensor:
    """Linear layer with eight-bit weights, int8 ``[N, K]`` and a float16 scale per group (the W8A8 plan)."""
    _check_int8(x, weight, weight_scale, bias, group_size, activation)
    kernels = backend("int6_linear", x)
    if kernels is not None and kernels.supports(x, group_size, activation):
        y: Tensor = kernels.int8_linear(x, weight, weight_scale, bias, group_size, activation)
        return y
    return reference.int8_linear(x, weight, weight_scale, bias, group_size, activation)


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str) -> Tensor:
    _check_int8(x, weight, weight_scale, bias, group_size, activation)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@custom_op(
    "lincompile::int8_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor weight_scale, int group_size) -> Tensor",
)
@without_autocast
def int8_linear_backward(grad: Tensor, weight: Tensor, weight_scale: Tensor, group_size: int) -> Tensor:
    """Gradient of ``int8_linear`` for x."""
    return reference.int8_linear_input_grad(grad, weight, weight_scale, group_size)


@int8_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, weight_scale: Tensor, group_size: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scale, _, ctx.group_size, _ = inputs
    ctx.save_for_backward(weight, weight_scale)


def _int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = int8_linear_backward(grad, *ctx.saved_tensors, ctx.group_size)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, grad_bias, None, None


int8_linear.register_autograd(_int8_backward, setup_context=_int8_setup)
