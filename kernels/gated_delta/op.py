"""``torch.ops.lincompile.gated_delta``: schema, checks, fake, gradient. Shapes: ``docs/architecture.md``."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.library import custom_op

from ..first_use import trusted
from ..registration import Grads, backend, gradient_fake, present, selected, without_autocast
from ..shapes import accumulator_dtype, require_qkv, require_same_device, require_shape
from . import reference

_DELTA_ARGS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? initial_state, float scale"


def _check_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, initial_state: Tensor | None
) -> None:
    op = "gated_delta"
    require_qkv(op, q, k, v, same_length=True)
    require_same_device(op, q, beta=beta, log_decay=log_decay, initial_state=initial_state)
    batch, kv_heads, length, head_dim = k.shape
    require_shape(op, "beta", beta, "[B, Hkv, T]", (batch, kv_heads, length))
    if log_decay is not None:
        require_shape(op, "log_decay", log_decay, "[B, Hkv, T, 1]", (batch, kv_heads, length, 1))
    if initial_state is not None:
        layout = "[B, Hkv, D, Dv]"
        require_shape(op, "initial_state", initial_state, layout, (batch, kv_heads, head_dim, v.shape[3]))


_LAYOUTS = ("b.t.", "b.t.", "b.t.", "b.t", "b.t.", "b...")  # as ``first_use`` reads them


def _scans(function: Any, *args: Any) -> reference.Scans:
    """What goes from chunk to chunk: Triton kernels on a GPU, a loop elsewhere. Within chunks everything is torch.

    Args:
        function: ``reference.chunkwise`` or ``chunkwise_backward``, which is called with ``args``.
    """
    kernels = backend("gated_delta", args[-7])
    if kernels is None or not kernels.supports(*args[-7:-1]):
        return reference.LOOPS
    scans = reference.Scans(kernels.scan_forward, kernels.scan_backward)
    layouts = _LAYOUTS if len(args) == 7 else ("b.t.", "b...", *_LAYOUTS)
    with_kernels = functools.partial(function, scans=scans)
    return (
        scans if trusted(f"gated_delta {function.__name__}", with_kernels, function, layouts, args) else reference.LOOPS
    )


@custom_op("lincompile::gated_delta", mutates_args=(), schema=f"({_DELTA_ARGS}) -> (Tensor o, Tensor final_state)")
@without_autocast
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule; returns ``o [B, H, T, Dv]`` (v's dtype), final state ``[B, Hkv, D, Dv]`` (float32/64)."""
    _check_delta(q, k, v, beta, log_decay, initial_state)
    args = (q, k, v, beta, log_decay, initial_state, scale)
    return reference.chunkwise(*args, scans=_scans(reference.chunkwise, *args))


@gated_delta.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_delta(q, k, v, beta, log_decay, initial_state)
    dtype = accumulator_dtype(q, k, v, beta, log_decay, initial_state)
    o = v.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return o, v.new_empty(k.shape[0], k.shape[1], k.shape[3], v.shape[3], dtype=dtype)


@custom_op(
    "lincompile::gated_delta_backward",
    mutates_args=(),
    schema=f"(Tensor grad_o, Tensor grad_state, {_DELTA_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gated_delta_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of ``gated_delta`` for its six tensors (empty where the input is absent)."""
    args = (grad_o, grad_state, q, k, v, beta, log_decay, initial_state, scale)
    grads = reference.chunkwise_backward(*args, scans=_scans(reference.chunkwise_backward, *args))
    return present(grads, q)


@gated_delta_backward.register_fake
def _(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    return gradient_fake(q, k, v, beta, log_decay, initial_state)


def _delta_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale = inputs[6]


def _delta_backward(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> Grads:
    grads = gated_delta_backward(grad_o, grad_state, *ctx.saved_tensors, ctx.scale)
    return selected(grads, ctx.needs_input_grad)


gated_delta.register_autograd(_delta_backward, setup_context=_delta_setup)
