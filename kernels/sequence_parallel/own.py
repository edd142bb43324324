"""A slice's own attention, tied to the exchange of states that runs beside it.

Without the tie only the order in which a graph was written keeps the all-gather in front of the slice's own work and
the wait behind it, and a compiler that orders by memory (Inductor does) puts them elsewhere. ``slice_own`` takes the
gathered tensor before its arrival, and its backward op the gathered gradients: neither reads them, but neither can
start before the exchange has, and no wait, which writes them, can be moved in front of their reader.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..gated_delta.op import gated_delta, gated_delta_backward
from ..linear_attention.op import linear_attention, linear_attention_backward
from ..registration import Grads, gradient_fake, selected
from ..shapes import accumulator_dtype

_ARGS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? log_decay, Tensor? initial_state"


@custom_op(
    "lincompile::slice_own",
    mutates_args=(),
    schema=f"({_ARGS}, Tensor gathered, Tensor slots, float scale) -> (Tensor o, Tensor slots)",
)
def slice_own(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    gathered: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What a slice sees of itself: causal ``linear_attention``, not normalised, or with beta ``gated_delta``.

    Args:
        gathered: summaries that are on their way; not read.
        slots: of ``state_slots``. Handed on to ``prefix_state``, whose gathered gradients come back through here.

    Returns:
        ``o [B, H, T, Dv]`` in v's dtype; the slots.
    """
    if beta is None:
        o = linear_attention(q, k, v, log_decay, initial_state, scale, True, False)[0]
    else:
        o = gated_delta(q, k, v, beta, log_decay, initial_state, scale)[0]
    return o, _like(slots)


def _like(slots: Tensor) -> Tensor:
    """Slots of their own (an op can't return its argument), without memory."""
    return slots.new_zeros(1, 1, 1, 1).expand(slots.shape)


@slice_own.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    gathered: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3]), _like(slots)


@custom_op(
    "lincompile::slice_own_backward",
    mutates_args=(),
    schema=f"(Tensor grad_o, Tensor gathered, {_ARGS}, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def slice_own_backward(
    grad_o: Tensor,
    gathered: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of ``slice_own`` for its first six tensors (empty where absent); ``gathered`` isn't read."""
    dtype = accumulator_dtype(q, k, v, beta, log_decay, initial_state)
    unused = torch.zeros(k.shape[0], k.shape[1], k.shape[3], v.shape[3], dtype=dtype, device=k.device)
    if beta is None:
        inputs = (q, k, v, log_decay, initial_state)
        d_q, d_k, d_v, *rest = linear_attention_backward(grad_o, unused, None, *inputs, scale, True, False)
        return d_q, d_k, d_v, q.new_empty(0), *rest
    return tuple(gated_delta_backward(grad_o, unused, q, k, v, beta, log_decay, initial_state, scale))


@slice_own_backward.register_fake
def _(
    grad_o: Tensor,
    gathered: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    return gradient_fake(q, k, v, beta, log_decay, initial_state)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale = inputs[8]


def _backward(ctx: Any, grad_o: Tensor, gathered: Tensor) -> Grads:
    grads = slice_own_backward(grad_o, gathered, *ctx.saved_tensors, ctx.scale)
    return *selected(grads, ctx.needs_input_grad[:6]), None, gathered, None


slice_own.register_autograd(_backward, setup_context=_setup)
