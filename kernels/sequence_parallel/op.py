"""State exchange between sequence-parallel ranks (LASP-2, arXiv 2502.07563, with decays, which the paper leaves out).

Rank r holds a contiguous slice of the sequence. From zero, its slice leaves the state M_r; passing through it decays
what came before by e^{a_r} (a_r = the sum of its log decays, per key feature). The state that reaches rank r is

    P_0 = 0,   P_{r+1} = e^{a_r} ⊙ P_r + M_r

so one all-gather of [M | a], as large as a state whatever the sequence's length, gives every rank its own P. The
gradient runs the other way: with dP gathered once,

    D_{W-1} = 0,   D_{r} = dP_{r+1} + e^{a_{r+1}} ⊙ D_{r+1},   dM_r = D_r,   da_r = Σ_columns D_r ⊙ e^{a_r} P_r

``gather_states`` starts the all-gather and doesn't wait; ``prefix_state`` waits. They are a pair: the exchange of the
backward pass happens in ``prefix_state``, which hands ``gather_states`` the finished gradient of its own slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

functional = torch.ops._c10d_functional


def rank_in(group: str) -> int:
    """This process's rank in a process group, by the group's name."""
    from torch.distributed import get_rank

    return get_rank(process_group(group))


def process_group(group: str) -> Any:
    """The process group of a name, as graphs refer to it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]


@custom_op("lincompile::rank_index", mutates_args=(), schema="(Tensor like, str group) -> Tensor")
def rank_index(like: Tensor, group: str) -> Tensor:
    """This rank, as an int64 scalar tensor on ``like``'s device: graphs stay the same on every rank."""
    return torch.tensor(rank_in(group), dtype=torch.int64, device=like.device)


@rank_index.register_fake
def _(like: Tensor, group: str) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


@custom_op("lincompile::gather_states", mutates_args=(), schema="(Tensor packed, int world, str group) -> Tensor")
def gather_states(packed: Tensor, world: int, group: str) -> Tensor:
    """Starts the all-gather of ``packed`` ``[B, Hkv, D, E]`` → ``[world · B, Hkv, D, E]``.

    The result may not have arrived: read it through ``prefix_state``.
    """
    gathered: Tensor = functional.all_gather_into_tensor(packed.contiguous(), world, group)
    return gathered


@gather_states.register_fake
def _(packed: Tensor, world: int, group: str) -> Tensor:
    return packed.new_empty(world * packed.shape[0], *packed.shape[1:])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.world, ctx.group = inputs[1:]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    slots = grad.view(ctx.world, grad.shape[0] // ctx.world, *grad.shape[1:])
    return slots[rank_in(ctx.group)], None, None


gather_states.register_autograd(_gather_backward, setup_context=_gather_setup)


@custom_op(
    "lincompile::prefix_state",
    mutates_args=(),
    schema="(Tensor gathered, int world, bool decay, bool causal, str group) -> (Tensor prefix, Tensor arrived)",
)
def prefix_state(gathered: Tensor, world: int, decay: bool, causal: bool, group: str) -> tuple[Tensor, Tensor]:
    """Waits for the gathered summaries; returns the state that reaches this rank (all ranks' sum when not causal).

    Args:
        gathered: ``[world · B, Hkv, D, E]``, or with ``decay`` ``[..., E + 1]``, whose last column is the log decay.

    Returns:
        ``prefix`` ``[B, Hkv, D, E]``, and what arrived ``[world, B, Hkv, D, …]``, which the backward pass needs.
    """
    waited: Tensor = functional.wait_tensor(gathered)
    arrived = waited.view(world, waited.shape[0] // world, *waited.shape[1:]).clone()
    return _prefix(arrived, decay, causal, rank_in(group)), arrived


@prefix_state.register_fake
def _(gathered: Tensor, world: int, decay: bool, causal: bool, group: str) -> tuple[Tensor, Tensor]:
    arrived = gathered.new_empty(world, gathered.shape[0] // world, *gathered.shape[1:])
    shape = arrived.shape[1:]
    return gathered.new_empty(*shape[:-1], shape[-1] - 1 if decay else shape[-1]), arrived


def _prefix(gathered: Tensor, decay: bool, causal: bool, rank: int) -> Tensor:
    states = gathered[..., :-1] if decay else gathered
    if not causal:
        return states.sum(0)
    state = torch.zeros_like(states[0])
    for other in range(rank):
        if decay:
            state = state * gathered[other, ..., -1:].exp()
        state = state + states[other]
    return state


@custom_op(
    "lincompile::prefix_state_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gathered, bool decay, bool causal, str group) -> Tensor",
)
def prefix_state_backward(grad: Tensor, gathered: Tensor, decay: bool, causal: bool, group: str) -> Tensor:
    """The gradient of ``gathered``: this rank's slot holds what all later ranks ask of it, the others are zero."""
    world, rank = gathered.shape[0], rank_in(group)
    grads: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(grad.contiguous(), world, group))
    grads = grads.view(world, *grad.shape)
    result = torch.zeros_like(gathered)
    if not causal:
        result[rank] = grads.sum(0)
        return result
    wanted = torch.zeros_like(grad)
    for other in range(world - 1, rank, -1):
        if decay and other < world - 1:
            wanted = wanted * gathered[other, ..., -1:].exp()
        wanted = grads[other] + wanted
    if decay:
        passing = gathered[rank, ..., -1:].exp() * _prefix(gathered, True, True, rank)
        result[rank] = torch.cat([wanted, (wanted * passing).sum(-1, keepdim=True)], -1)
    else:
        result[rank] = wanted
    return result


@prefix_state_backward.register_fake
def _(grad: Tensor, gathered: Tensor, decay: bool, causal: bool, group: str) -> Tensor:
    return torch.empty_like(gathered)


def _prefix_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[2:]


def _prefix_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    (arrived,) = ctx.saved_tensors
    return prefix_state_backward(grad, arrived, *ctx.options).flatten(0, 1), None, None, None, None


prefix_state.register_autograd(_prefix_backward, setup_context=_prefix_setup)
