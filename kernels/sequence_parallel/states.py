"""State exchange between sequence-parallel ranks (LASP-2, arXiv 2502.07563, with decays, which the paper leaves out).

Rank r holds a contiguous slice of the sequence. From zero, its slice leaves the state M_r; what came before passes
through it: decayed by e^{a_r} (a_r = the sum of its log decays, per key feature), or, in the delta rule, multiplied by
a matrix A_r. The state that reaches rank r is

    P_0 = initial,   P_{r+1} = A_r P_r + M_r        (A_r = diag(e^{a_r}) where it is a decay)

so one all-gather of [M | a] (or [M | A]), as large as a state whatever the sequence's length, gives every rank its own
P and the state after the last one. The gradient runs the other way: with dP gathered once,

    D_{W-1} = 0,   D_r = dP_{r+1} + A_{r+1}ᵀ D_{r+1},   dM_r = D_r,   dA_r = D_r P_rᵀ

(for a decay, da_r = Σ_columns D_r ⊙ e^{a_r} P_r).

In a graph, a site is

    packed   = segment_summary(k, v, log_decay, normalize)
    gathered = _c10d_functional.all_gather_into_tensor(detach(packed), W, group)      starts
    slots    = state_slots(packed, gathered, …)
    own, slots = slice_own(…, gathered, slots, …)        what the slice sees of itself   meanwhile
    arrived  = _c10d_functional.wait_tensor(gathered)
    prefix, final = prefix_state(arrived, slots, …)

``slots`` is never read: it carries the gradient. The backward pass of ``prefix_state`` starts the all-gather of dP and
hands on the result without waiting; that of ``slice_own`` runs meanwhile; that of ``state_slots`` waits. (Bidirectional
sites have no ``slice_own``: nothing in them can run without the others' states.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..linear_attention import segments
from ..registration import Grads, backend, gradient_fake, present, selected
from ..shapes import accumulator_dtype
from .group import functional, rank_in

# What of an earlier state passes through a slice: all of it, a decay per key feature, or a matrix.
ALL, DECAY, MATRIX = "all", "decay", "matrix"
_OPTIONS = "int world, int columns, str passing, bool causal, str group"


@custom_op(
    "lincompile::segment_summary",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor? log_decay, bool normalize) -> Tensor",
)
def segment_summary(k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool) -> Tensor:
    """``[M | a]`` of a slice, ``[B, Hkv, D, Dv (+1 when normalised) (+1 with decay)]``, float32 (float64 for float64).

    On a GPU by the kernels that the fused forward uses for the segments of a long sequence.
    """
    dtype = accumulator_dtype(k, v, log_decay)
    total = None
    if log_decay is not None:
        total = log_decay.to(dtype).expand(k.shape).sum(-2).unsqueeze(-1)
    kernels = backend("linear_attention", k)
    if kernels is not None and kernels.supports(k, k, v, log_decay, None, True):
        return segments.packed(kernels.segment_state(k, v, log_decay, normalize), total)
    decay = None if log_decay is None else log_decay.to(dtype)
    return segments.packed(*segments.summary(k.to(dtype), _augmented(v.to(dtype), normalize), decay))


def _augmented(v: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.pad(v, (0, 1), value=1.0) if normalize else v


@segment_summary.register_fake
def _(k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool) -> Tensor:
    columns = v.shape[3] + int(normalize) + int(log_decay is not None)
    return k.new_empty(k.shape[0], k.shape[1], k.shape[3], columns, dtype=accumulator_dtype(k, v, log_decay))


@custom_op(
    "lincompile::segment_summary_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor k, Tensor v, Tensor? log_decay, bool normalize) -> (Tensor, Tensor, Tensor)",
)
def segment_summary_backward(
    grad: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool
) -> tuple[Tensor, ...]:
    """Gradients of ``segment_summary`` for k, v, log_decay (empty where absent)."""
    dtype = grad.dtype
    decay = None if log_decay is None else log_decay.to(dtype)
    d_state, d_total = (grad, None) if decay is None else (grad[..., :-1], grad[..., -1:])
    values = _augmented(v.to(dtype), normalize)
    d_k, d_v, d_decay = segments.summary_backward(d_state, d_total, k.to(dtype), values, decay)
    if d_decay is not None and log_decay is not None:
        d_decay = d_decay.to(log_decay.dtype)
    return present((d_k.to(k.dtype), d_v[..., : v.shape[3]].to(v.dtype), d_decay), k)


@segment_summary_backward.register_fake
def _(grad: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool) -> tuple[Tensor, ...]:
    return gradient_fake(k, v, log_decay)


def _summary_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.normalize = inputs[3]


def _summary_backward(ctx: Any, grad: Tensor) -> Grads:
    return selected(segment_summary_backward(grad, *ctx.saved_tensors, ctx.normalize), ctx.needs_input_grad)


segment_summary.register_autograd(_summary_backward, setup_context=_summary_setup)


def _split(arrived: Tensor, columns: int, passing: str) -> tuple[Tensor, Tensor | None]:
    """States ``[W, B, Hkv, D, columns]`` and what each rank lets through, of gathered ``[W, B, Hkv, D, …]``."""
    states = arrived[..., :columns]
    if passing == ALL:
        return states, None
    rest = arrived[..., columns:]
    return states, rest.exp() if passing == DECAY else rest


def _states(arrived: Tensor, initial: Tensor | None, columns: int, passing: str) -> list[Tensor]:
    """P of every rank and, last, the state after all of them."""
    states, through = _split(arrived, columns, passing)
    start = torch.zeros_like(states[0]) if initial is None else initial.to(states.dtype)
    return segments.chain(states, through, start)


def _by_rank(gathered: Tensor, world: int) -> Tensor:
    return gathered.view(world, gathered.shape[0] // world, *gathered.shape[1:])


@custom_op(
    "lincompile::prefix_state",
    mutates_args=(),
    schema=f"(Tensor arrived, Tensor slots, Tensor? initial, {_OPTIONS}) -> (Tensor prefix, Tensor final)",
)
def prefix_state(
    arrived: Tensor,
    slots: Tensor,
    initial: Tensor | None,
    world: int,
    columns: int,
    passing: str,
    causal: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The state that reaches this rank (all ranks' sum when not causal) and the state after the whole sequence.

    Args:
        arrived: gathered summaries ``[world · B, Hkv, D, columns (+1 for a decay, +D for a matrix)]``.
        slots: ``state_slots`` of this rank's summary.
        initial: the state before the first rank's slice ``[B, Hkv, D, columns]``, the same on every rank. The gradient
            doesn't reach it, nor does one come from ``final``: both are for inference.

    Returns:
        Both ``[B, Hkv, D, columns]``.
    """
    states = _states(_by_rank(arrived, world), initial, columns, passing)
    final = states[-1].clone()
    return (states[rank_in(group)] if causal else final).clone(), final


@prefix_state.register_fake
def _(
    arrived: Tensor,
    slots: Tensor,
    initial: Tensor | None,
    world: int,
    columns: int,
    passing: str,
    causal: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    shape = (arrived.shape[0] // world, arrived.shape[1], arrived.shape[2], columns)
    return arrived.new_empty(shape), arrived.new_empty(shape)


def _prefix_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.resumed = inputs[2] is not None
    ctx.world, ctx.group = inputs[3], inputs[7]


def _prefix_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.resumed:
        raise RuntimeError("lincompile.prefix_state: gradients don't reach the state a sequence was resumed from")
    gathered = functional.all_gather_into_tensor(grad.contiguous(), ctx.world, ctx.group)
    # Looking for NaN reads gradients as they pass. (Tracing enables anomaly mode too, without the look.)
    if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        gathered = functional.wait_tensor(gathered)
    return None, gathered, None, None, None, None, None, None


prefix_state.register_autograd(_prefix_backward, setup_context=_prefix_setup)


@custom_op("lincompile::state_slots", mutates_args=(), schema=f"(Tensor packed, Tensor gathered, {_OPTIONS}) -> Tensor")
def state_slots(
    packed: Tensor, gathered: Tensor, world: int, columns: int, passing: str, causal: bool, group: str
) -> Tensor:
    """Ties ``prefix_state`` to this rank's summary for the gradient: ``[world · B, Hkv, D, columns]``, no memory."""
    batch, kv_heads, head_dim, _ = packed.shape
    return packed.new_zeros(1, 1, 1, 1).expand(world * batch, kv_heads, head_dim, columns)


@state_slots.register_fake
def _(packed: Tensor, gathered: Tensor, world: int, columns: int, passing: str, causal: bool, group: str) -> Tensor:
    batch, kv_heads, head_dim, _ = packed.shape
    return packed.new_empty(1, 1, 1, 1).expand(world * batch, kv_heads, head_dim, columns)


@custom_op("lincompile::slot_gradient", mutates_args=(), schema=f"(Tensor grads, Tensor arrived, {_OPTIONS}) -> Tensor")
def slot_gradient(
    grads: Tensor, arrived: Tensor, world: int, columns: int, passing: str, causal: bool, group: str
) -> Tensor:
    """The gradient of this rank's summary: what all later ranks ask of it (all ranks when not causal)."""
    wanted, rank = _by_rank(grads, world), rank_in(group)
    summaries = _by_rank(arrived, world)
    if not causal:
        return wanted.sum(0)
    _, through = _split(summaries, columns, passing)
    later = slice(rank + 1, world)
    back = None
    if through is not None:
        back = (through if passing == DECAY else through.transpose(-1, -2))[later].flip(0)
    d_state = segments.chain(wanted[later].flip(0), back, torch.zeros_like(wanted[0]))[-1]
    if through is None:
        return d_state.clone()
    before = _states(summaries[:rank], None, columns, passing)[-1] if rank else torch.zeros_like(d_state)
    if passing == DECAY:
        d_through = (d_state * through[rank] * before).sum(-1, keepdim=True)
    else:
        d_through = d_state @ before.transpose(-1, -2)
    return torch.cat((d_state, d_through), -1)


@slot_gradient.register_fake
def _(grads: Tensor, arrived: Tensor, world: int, columns: int, passing: str, causal: bool, group: str) -> Tensor:
    return arrived.new_empty(arrived.shape[0] // world, *arrived.shape[1:])


def _slots_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.gathered = inputs[1]  # not save_for_backward: its arrival would count as a change since
    ctx.options = inputs[2:]


def _slots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arrived = functional.wait_tensor(ctx.gathered)  # has long arrived
    return slot_gradient(functional.wait_tensor(grad), arrived, *ctx.options), *(None,) * 6


state_slots.register_autograd(_slots_backward, setup_context=_slots_setup)
