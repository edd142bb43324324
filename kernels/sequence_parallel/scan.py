"""The other way to exchange states: passed from rank to rank in pieces (the pipelined scan of ZeCO, arXiv 2507.01004).

An all-gather brings every rank all W summaries: W − 1 states received. Passed on, each rank receives one state; the
chain is W − 1 hops long, but cut into pieces they follow one another down the chain, so that the last rank waits for
W − 2 pieces, not states. Worth it where W states take long to send (``benchmarks/sequence_parallel.py`` says when).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .group import process_group, rank_in


def _passed(
    own: Tensor, through: Tensor | None, pieces: int, order: tuple[int | None, int | None], group: str
) -> Tensor:
    """Receives a state from one neighbour, sends ``through ⊙ it + own`` to the other; returns what was received.

    own ``[B, Hkv, D, columns]``; ``order``: the neighbours' ranks in the group, None at the ends (zeros come in there).
    """
    import torch.distributed as dist

    ranks = process_group(group)
    source, target = (None if place is None else dist.get_global_rank(ranks, place) for place in order)
    received, sent = torch.zeros_like(own), []
    for part in torch.tensor_split(torch.arange(own.shape[2]), min(pieces, own.shape[2])):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        if source is not None:
            piece = torch.empty_like(own[:, :, rows], memory_format=torch.contiguous_format)
            dist.recv(piece, source, group=ranks)
            received[:, :, rows] = piece
        if target is not None:
            leaving = received[:, :, rows] if through is None else received[:, :, rows] * through[:, :, rows]
            leaving = (leaving + own[:, :, rows]).contiguous()
            sent.append((leaving, dist.isend(leaving, target, group=ranks)))  # kept until it has left
    for _, work in sent:
        if work is not None:
            work.wait()
    return received


def _neighbours(world: int, group: str, reverse: bool) -> tuple[int | None, int | None]:
    rank = rank_in(group)
    before, after = (rank - 1 if rank else None), (rank + 1 if rank < world - 1 else None)
    return (after, before) if reverse else (before, after)


@custom_op(
    "lincompile::scan_state",
    mutates_args=(),
    schema="(Tensor packed, int world, int columns, int pieces, str group) -> Tensor",
)
def scan_state(packed: Tensor, world: int, columns: int, pieces: int, group: str) -> Tensor:
    """The state that reaches this rank ``[B, Hkv, D, columns]``, from its summary ``[M]`` or ``[M | a]``."""
    own = packed[..., :columns]
    through = packed[..., columns:].exp() if packed.shape[3] > columns else None
    return _passed(own, through, pieces, _neighbours(world, group, False), group)


@scan_state.register_fake
def _(packed: Tensor, world: int, columns: int, pieces: int, group: str) -> Tensor:
    return packed.new_empty(*packed.shape[:3], columns)


@custom_op(
    "lincompile::scan_state_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor packed, Tensor prefix, int world, int columns, int pieces, str group) -> Tensor",
)
def scan_state_backward(
    grad: Tensor, packed: Tensor, prefix: Tensor, world: int, columns: int, pieces: int, group: str
) -> Tensor:
    """The gradient of the summary: the same chain from the last rank to the first."""
    through = packed[..., columns:].exp() if packed.shape[3] > columns else None
    wanted = _passed(grad.contiguous(), through, pieces, _neighbours(world, group, True), group)
    if through is None:
        return wanted
    return torch.cat((wanted, (wanted * through * prefix).sum(-1, keepdim=True)), -1)


@scan_state_backward.register_fake
def _(grad: Tensor, packed: Tensor, prefix: Tensor, world: int, columns: int, pieces: int, group: str) -> Tensor:
    return torch.empty_like(packed)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.options = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return scan_state_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


scan_state.register_autograd(_backward, setup_context=_setup)
