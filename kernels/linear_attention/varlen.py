"""``torch.ops.lincompile.linear_attention_varlen``: sequences of their own lengths side by side in one row.

The same function as ``linear_attention`` (causal) on each sequence ``[cu_seqlens[i], cu_seqlens[i + 1])`` of q, k and
v ``[1, ·, T, ·]``, without padding. States are one per sequence. Reading ``cu_seqlens`` from a GPU waits for it: pass
a CPU tensor where that matters (in a CUDA graph it must be one, of the lengths that the graph was recorded with).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..first_use import TOKENS, trusted
from ..registration import backend, gradient_fake, present, without_autocast
from ..shapes import accumulator_dtype, require
from . import varlen_reference
from .op import check_linear, forward_forms, register_gradient

_OP = "linear_attention_varlen"
_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor cu_seqlens, float scale, "
    "bool normalize"
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    normalize: bool,
) -> int:
    """Number of sequences."""
    require(
        q.dim() == 4 and q.shape[0] == 1, _OP, f"sequences lie side by side in one row (B = 1), got {list(q.shape)}"
    )
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    require(cu_seqlens.dim() == 1 and integers, _OP, "cu_seqlens must be int32 or int64 of shape [sequences + 1]")
    require(cu_seqlens.shape[0] > 1, _OP, "cu_seqlens needs at least two entries: 0 and the end of the first sequence")
    count = cu_seqlens.shape[0] - 1
    # One state for each sequence takes the place of the batch in the checks.
    check_linear(_OP, q, k, v, log_decay, initial_state, True, normalize, states=count)
    return count


def lengths_of(cu_seqlens: Tensor, total: int) -> tuple[int, ...]:
    """Lengths of the sequences; ``ValueError`` where the bounds don't cover the tokens in order."""
    bounds = cu_seqlens.tolist()
    ordered = all(a <= b for a, b in itertools.pairwise(bounds))
    fits = bounds[0] == 0 and bounds[-1] == total and ordered
    require(fits, _OP, f"cu_seqlens must rise from 0 to the {total} tokens, got {_short(bounds)}")
    return tuple(b - a for a, b in itertools.pairwise(bounds))


def _short(bounds: list[int]) -> str:
    return str(bounds) if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:6]))}, …, {bounds[-1]}]"


def _serves(kernels: ModuleType, grads: tuple[Tensor | None, ...], inputs: tuple[Any, ...]) -> bool:
    """Whether the kernels take this call: they do, and a first use on the beginning of its tokens, cut into sequences
    of our own, was right.

    Args:
        grads: ``grad_o``, ``grad_state`` and ``o`` of a backward call; empty for a forward one.
        inputs: q, k, v, log_decay, initial_state, scale, normalize.
    """
    *tensors, scale, normalize = inputs
    if not kernels.supports(*tensors):
        return False
    # Of a few lengths only, so that not every length is compared anew.
    tokens = next(n for n in (TOKENS, 64, 1) if n <= tensors[1].shape[2])
    lengths = (tokens // 2, 0, 1, tokens - tokens // 2 - 1) if tokens > 1 else (1,)

    def row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :, :tokens]

    def states(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:1].expand(len(lengths), -1, -1, -1)

    few = (*map(row, tensors[:4]), states(tensors[4]), scale, True, normalize)

    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, *options: Any) -> Any:
        start = None if state is None else state.contiguous()
        return kernels.chunkwise(q, k, v, g, start, scale, True, normalize, lengths)

    def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, *options: Any) -> Any:
        return varlen_reference.forward(q, k, v, g, state, lengths, scale, normalize)

    if not grads:
        return trusted(_OP, forward, plain, (), few, forms=forward_forms)

    def backward(d_o: Tensor, d_state: Tensor, o: Tensor | None, *args: Any) -> Any:
        q, k, v, g, state = args[:5]
        start = None if state is None else state.contiguous()
        saved = None if o is None else plain(*args)[0].to(v.dtype)
        return kernels.chunkwise_backward(
            d_o, d_state.contiguous(), saved, q, k, v, g, start, scale, True, normalize, lengths
        )

    def plain_backward(d_o: Tensor, d_state: Tensor, o: Tensor | None, *args: Any) -> Any:
        q, k, v, g, state = args[:5]
        return varlen_reference.backward(d_o, d_state, q, k, v, g, state, lengths, scale, normalize)

    def forms(args: Sequence[Any]) -> list[Sequence[Any]]:
        return [(*args[:3], *form) for form in forward_forms(args[3:])]

    given = (row(grads[0]), states(grads[1]), row(grads[2]))
    return trusted(f"{_OP}_backward", backward, plain_backward, (), (*given, *few), forms=forms)


@custom_op(f"lincompile::{_OP}", mutates_args=(), schema=f"({_ARGS}) -> (Tensor o, Tensor final_states)")
@without_autocast
def linear_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention of each sequence.

    Args:
        q, k, v: ``[1, H, T, D]``, ``[1, Hkv, T, D]``, ``[1, Hkv, T, Dv]``; T tokens of all sequences.
        log_decay: ``[1, Hkv, T, D or 1]`` or None.
        initial_state: ``[sequences, Hkv, D, Dv]`` (``Dv + 1`` if ``normalize``) or None.
        cu_seqlens: int32 or int64 ``[sequences + 1]``, rising from 0 to T; a sequence may be empty.

    Returns:
        ``o [1, H, T, Dv]`` in v's dtype, and the last states ``[sequences, Hkv, D, Dv (+ 1)]`` (float32/64).

    Raises:
        ValueError: shapes that don't fit, or bounds that don't cover the tokens in order.
    """
    _check(q, k, v, log_decay, initial_state, cu_seqlens, normalize)
    lengths = lengths_of(cu_seqlens, k.shape[2])
    kernels = backend("linear_attention", q)
    if kernels is not None and _serves(kernels, (), (q, k, v, log_decay, initial_state, scale, normalize)):
        o, state = kernels.chunkwise(q, k, v, log_decay, initial_state, scale, True, normalize, lengths)
        return o, state
    return varlen_reference.forward(q, k, v, log_decay, initial_state, lengths, scale, normalize)


@linear_attention_varlen.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    count = _check(q, k, v, log_decay, initial_state, cu_seqlens, normalize)
    o = v.new_empty(1, q.shape[1], q.shape[2], v.shape[3])
    dtype = accumulator_dtype(q, k, v, log_decay, initial_state)
    return o, v.new_empty(count, k.shape[1], k.shape[3], v.shape[3] + int(normalize), dtype=dtype)


@custom_op(
    f"lincompile::{_OP}_backward",
    mutates_args=(),
    schema=f"(Tensor grad_o, Tensor grad_state, Tensor? o, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_attention_varlen_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """Gradients for the five tensors (empty where absent); ``o`` when it was normalised."""
    lengths = lengths_of(cu_seqlens, k.shape[2])
    inputs = (q, k, v, log_decay, initial_state)
    kernels = backend("linear_attention", q)
    if kernels is not None and _serves(kernels, (grad_o, grad_state, o), (*inputs, scale, normalize)):
        grads = kernels.chunkwise_backward(grad_o, grad_state, o, *inputs, scale, True, normalize, lengths)
    else:
        grads = varlen_reference.backward(grad_o, grad_state, *inputs, lengths, scale, normalize)
    return present(grads, q)


@linear_attention_varlen_backward.register_fake
def _(
    grad_o: Tensor,
    grad_state: Tensor,
    o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    return gradient_fake(q, k, v, log_decay, initial_state)


register_gradient(linear_attention_varlen, linear_attention_varlen_backward, 6)
