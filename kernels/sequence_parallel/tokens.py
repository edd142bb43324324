"""What ranks exchange token by token: halos of convolutions and windows, keys and values of kept softmax (LASP-2H).

Slices are contiguous, of equal length, and rank r's is the r-th. All exchanges know their rank at run time only, so
that every rank runs the same graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..registration import Grads, gradient_fake, selected
from ..shapes import require
from ..softmax_attention import reference as softmax
from .group import functional, gather, rank_in


def _exchange(x: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
    """All-to-all along axis 0: ``send[i]`` rows go to rank i, ``receive[i]`` come from it."""
    narrow = x.to(torch.uint8) if x.dtype == torch.bool else x
    result: Tensor = functional.wait_tensor(functional.all_to_all_single(narrow.contiguous(), receive, send, group))
    return result.bool() if x.dtype == torch.bool else result


def _only(rank: int, count: int, world: int) -> list[int]:
    return [count if other == rank else 0 for other in range(world)]


def _before(x: Tensor, initial: Tensor | None, size: int) -> Tensor:
    """The last ``size`` entries of ``initial`` along axis 0, zeros first where it has fewer."""
    start = x.new_zeros(0, *x.shape[1:]) if initial is None else initial
    kept = start[max(0, start.shape[0] - size) :]
    return torch.cat((x.new_zeros(size - kept.shape[0], *x.shape[1:]), kept))


@custom_op(
    "lincompile::halo",
    mutates_args=(),
    schema="(Tensor x, Tensor? initial, int size, int axis, int world, str group) -> Tensor",
)
def halo(x: Tensor, initial: Tensor | None, size: int, axis: int, world: int, group: str) -> Tensor:
    """The ``size`` entries before this rank's slice along ``axis``; zeros (False) where there are none.

    Each rank sends its last ``size`` entries to the next one; slices shorter than that are gathered whole.
    ``initial`` holds what comes before the first rank's slice (no gradient reaches it).
    """
    rows = x.movedim(axis, 0)
    before = _before(rows, None if initial is None else initial.movedim(axis, 0), size)
    rank, length = rank_in(group), rows.shape[0]
    if length >= size:
        last = rank == world - 1
        tail = rows[length - size :] if not last else rows[:0]
        got = _exchange(
            tail, _only(rank - 1, size, world), _only(rank + 1, size, world) if not last else [0] * world, group
        )
        found = got if rank else before
    else:
        earlier = gather(rows, world, group)[:rank].flatten(0, 1)
        found = torch.cat((before, earlier))[-size:]
    return found.movedim(0, axis).contiguous()


@halo.register_fake
def _(x: Tensor, initial: Tensor | None, size: int, axis: int, world: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[axis] = size
    return x.new_empty(shape)


@custom_op(
    "lincompile::halo_backward",
    mutates_args=(),
    schema="(Tensor grad, SymInt length, int axis, int world, str group) -> Tensor",
)
def halo_backward(grad: Tensor, length: int, axis: int, world: int, group: str) -> Tensor:
    """The gradient of ``halo`` for a slice of ``length``: what the ranks that read its end ask of it."""
    rows = grad.movedim(axis, 0)
    rank, size = rank_in(group), rows.shape[0]
    if length >= size:
        first = rank == 0
        asked = rows if not first else rows[:0]
        receive = _only(rank + 1, size, world) if rank < world - 1 else [0] * world
        got = _exchange(asked, receive, _only(rank - 1, size, world) if not first else [0] * world, group)
        result = rows.new_zeros(length, *rows.shape[1:])
        result[length - got.shape[0] :] += got
    else:
        spread = rows.new_zeros(world * length, *rows.shape[1:])
        known = min(size, rank * length)
        spread[rank * length - known : rank * length] = rows[size - known :]
        result = functional.wait_tensor(functional.reduce_scatter_tensor(spread, "sum", world, group))
    return result.movedim(0, axis).contiguous()


@halo_backward.register_fake
def _(grad: Tensor, length: int, axis: int, world: int, group: str) -> Tensor:
    shape = list(grad.shape)
    shape[axis] = length
    return grad.new_empty(shape)


def _halo_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = (inputs[0].shape[inputs[3]], *inputs[3:])


def _halo_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return halo_backward(grad, *ctx.options), None, None, None, None, None


halo.register_autograd(_halo_backward, setup_context=_halo_setup)


@custom_op(
    "lincompile::last_tokens",
    mutates_args=(),
    schema="(Tensor x, Tensor initial, int size, int axis, int world, str group) -> Tensor",
)
def last_tokens(x: Tensor, initial: Tensor, size: int, axis: int, world: int, group: str) -> Tensor:
    """The last ``size`` entries of ``initial`` and all slices along ``axis`` (fewer where there aren't as many)."""
    rows = x.movedim(axis, 0)
    kept = min(size, rows.shape[0])
    tails = gather(rows[rows.shape[0] - kept :], world, group)
    if kept == size:
        found = tails[-1]
    else:  # the slices are shorter: their ends are all there is of them
        found = torch.cat((initial.movedim(axis, 0), tails.flatten(0, 1)))[-size:]
    return found.movedim(0, axis).contiguous()


@last_tokens.register_fake
def _(x: Tensor, initial: Tensor, size: int, axis: int, world: int, group: str) -> Tensor:
    shape = list(x.shape)
    everything = initial.shape[axis] + world * x.shape[axis]
    shape[axis] = torch.sym_min(size, everything)  # type: ignore[no-untyped-call]
    return x.new_empty(shape)


# --- kept softmax: a slice's queries against the keys of the whole sequence ---------------------------------------


def _parts(length: int, keys: int, balanced: bool, world: int, rank: int) -> list[tuple[slice, int]]:
    """(rows of the queries, how many keys there are up to the last of them) for this rank."""
    past = keys - world * length
    if not balanced:
        return [(slice(0, length), past + (rank + 1) * length)]
    half = length // 2
    return [(slice(0, half), past + (rank + 1) * half), (slice(half, length), past + (2 * world - rank) * half)]


_SLICE = "Tensor? key_padding, str kind, float scale, float softcap, bool balanced, int world, str group"


@custom_op("lincompile::slice_attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_SLICE}) -> Tensor")
def slice_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    scale: float,
    softcap: float,
    balanced: bool,
    world: int,
    group: str,
) -> Tensor:
    """Softmax attention of this rank's queries ``[B, H, T, D]`` to the whole sequence's keys ``[B, Hkv, P + W·T, D]``.

    Causal queries are given only the keys up to their own slice's end, so nothing is computed to be masked away.
    ``balanced``: the queries are the r-th and the r-th last of 2·W pieces (``exchange_halves``).
    """
    if kind == "full":
        return softmax.forward(q, k, v, key_padding, "full", 0, scale, softcap)
    parts = []
    for rows, end in _parts(q.shape[2], k.shape[2], balanced, world, rank_in(group)):
        padding = None if key_padding is None else key_padding[:, :end]
        parts.append(softmax.forward(q[:, :, rows], k[:, :, :end], v[:, :, :end], padding, "causal", 0, scale, softcap))
    return torch.cat(parts, 2)


@slice_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    scale: float,
    softcap: float,
    balanced: bool,
    world: int,
    group: str,
) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@custom_op(
    "lincompile::slice_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_o, Tensor q, Tensor k, Tensor v, {_SLICE}) -> (Tensor, Tensor, Tensor)",
)
def slice_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    scale: float,
    softcap: float,
    balanced: bool,
    world: int,
    group: str,
) -> tuple[Tensor, ...]:
    """Gradients of ``slice_attention`` for q, k, v: of k and v what this rank's queries ask."""
    if kind == "full":
        return softmax.backward(grad_o, q, k, v, key_padding, "full", 0, scale, softcap)
    d_q, d_k, d_v = [], torch.zeros_like(k).contiguous(), torch.zeros_like(v).contiguous()
    for rows, end in _parts(q.shape[2], k.shape[2], balanced, world, rank_in(group)):
        padding = None if key_padding is None else key_padding[:, :end]
        part, part_k, part_v = softmax.backward(
            grad_o[:, :, rows], q[:, :, rows], k[:, :, :end], v[:, :, :end], padding, "causal", 0, scale, softcap
        )
        d_q.append(part)
        d_k[:, :, :end] += part_k
        d_v[:, :, :end] += part_v
    return torch.cat(d_q, 2), d_k, d_v


@slice_attention_backward.register_fake
def _(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    scale: float,
    softcap: float,
    balanced: bool,
    world: int,
    group: str,
) -> tuple[Tensor, ...]:
    return gradient_fake(q, k, v)


def _slice_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _slice_backward(ctx: Any, grad_o: Tensor) -> Grads:
    return selected(slice_attention_backward(grad_o, *ctx.saved_tensors, *ctx.options), ctx.needs_input_grad)


slice_attention.register_autograd(_slice_backward, setup_context=_slice_setup)


@custom_op(
    "lincompile::exchange_halves", mutates_args=(), schema="(Tensor x, bool back, int world, str group) -> Tensor"
)
def exchange_halves(x: Tensor, back: bool, world: int, group: str) -> Tensor:
    """Head–tail order for causal softmax: rank r gets the r-th and the r-th last of 2·W pieces, so that all work alike.

    x ``[B, H, T, D]``: the halves of a slice, pieces 2r and 2r + 1. ``back`` undoes it.

    Raises:
        ValueError: T is odd.
    """
    length = x.shape[2]
    require(length % 2 == 0, "exchange_halves", f"balanced softmax needs slices of even length, got {length} tokens")
    rank, half = rank_in(group), length // 2
    own = [2 * rank, 2 * rank + 1]
    balanced = [rank, 2 * world - 1 - rank]
    # where my pieces go, in their order, and whom the new ones come from: one owner's pieces travel in order
    if back:
        held, targets = balanced, [piece // 2 for piece in balanced]
        sources = [min(piece, 2 * world - 1 - piece) for piece in own]
    else:
        held, targets = own, [min(piece, 2 * world - 1 - piece) for piece in own]
        sources = [piece // 2 for piece in balanced]
    pieces = torch.stack(torch.split(x, half, 2))
    order = sorted(range(len(held)), key=lambda i: (targets[i], held[i]))
    send = [targets.count(other) for other in range(world)]
    receive = [sources.count(other) for other in range(world)]
    got = _exchange(pieces[order], receive, send, group)
    arrived = sorted(range(2), key=lambda i: (sources[i], i))  # by source, then in order
    return torch.cat([got[arrived.index(i)] for i in range(2)], 2)


@exchange_halves.register_fake
def _(x: Tensor, back: bool, world: int, group: str) -> Tensor:
    return torch.empty_like(x).contiguous()


def _halves_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _halves_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    back, world, group = ctx.options
    return exchange_halves(grad, not back, world, group), None, None, None


exchange_halves.register_autograd(_halves_backward, setup_context=_halves_setup)
