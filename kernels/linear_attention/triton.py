"""Linear attention on a GPU: the same functions as ``reference.py``, by fused Triton kernels.

One configuration per head size, chosen by rule, no autotuning. bfloat16 inputs run on bfloat16 tensor cores with
float32 accumulation and state; other float inputs run in float32. Which of the two ways to spread decays is used
(see ``triton_blocks.py``) is decided on the device, per problem, without a synchronisation.

The chunk kernels run on heads exactly one block wide, or on keys of several blocks (a LAWCAT head of 128 channels has
256 features), piece by piece: each adds to what the pieces before it left. Other heads are cut here (outputs are sums
over blocks of keys, and columns over blocks of values) and padded with zeros. Blocks are never narrower than 64
columns: there, Triton 3.6 generates wrong code for Hopper's matrix unit (seen in dv with 32 value columns).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registration import UNMEASURED
from ..triton_device import INTERPRETED, shared_memory
from . import triton_bidirectional
from .triton_launch import Grads, Lengths, backward, forward, state_alone
from .triton_plan import block_widths, fits, roomy

NORMALIZER_EPS = 1e-10
# The configuration for other chips hasn't been checked on one yet: off there, until it has been.
SMALL_CHIPS = INTERPRETED or UNMEASURED
# Per block of threads, with heads cut into blocks of 64 columns: consumer chips have 99 KiB.
LEAST_SHARED_MEMORY = 99 * 1024


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
) -> bool:
    """Whether these kernels serve a call: at least one token, no float64, and a chip with enough shared memory. The
    reference serves the others, on the same device.
    """
    wide = any(x is not None and x.dtype == torch.float64 for x in (q, k, v, log_decay, initial_state))
    chip = roomy(q.device) or (SMALL_CHIPS and shared_memory(q.device) >= LEAST_SHARED_MEMORY)
    return chip and not wide and min(k.shape[2], q.shape[2], k.shape[3], v.shape[3]) > 0


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
    lengths: Lengths = None,
) -> tuple[Tensor, Tensor]:
    """Forward; see ``reference.chunkwise`` for shapes, and ``varlen_reference`` for ``lengths``."""
    assert supports(q, k, v, log_decay, initial_state)
    if not causal:
        return triton_bidirectional.forward(q, k, v, initial_state, scale, normalize)
    if (k.shape[2] == 1 and lengths is None) or fits(q, k, v):
        return forward(q, k, v, log_decay, initial_state, scale, normalize, v.dtype, lengths)
    out, state = _wide_forward(q, k, _augment(v, normalize), log_decay, initial_state, scale, lengths)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + NORMALIZER_EPS)
    return out.to(v.dtype), state


def segment_state(k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool) -> Tensor:
    """The state that a stretch of tokens leaves from zero (``segments.summary``), float32.

    By the kernels that sum up the segments of a long sequence in ``chunkwise``.
    """
    assert supports(k, k, v, log_decay, None)
    if fits(k, k, v):
        return state_alone(k, v, log_decay, normalize)
    values = _augment(v, normalize)
    state = torch.empty((*k.shape[:2], k.shape[3], values.shape[3]), dtype=torch.float32, device=k.device)
    for piece, _, _ in _pieces(k, k, values, log_decay, None):
        _, keys, columns, gates, _ = piece.tensors
        state[:, :, piece.keys, piece.values] = piece.cut_state(state_alone(keys, columns, gates, False))
    return state


def chunkwise_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
    lengths: Lengths = None,
    values: bool = True,
) -> Grads:
    """Gradients for q, k, v, log_decay, initial_state; states are recomputed from the inputs. Without ``values`` v's
    may hold nothing.
    """
    assert supports(q, k, v, log_decay, initial_state)
    if not causal:
        return triton_bidirectional.backward(grad_o, grad_state, o, q, k, v, initial_state, scale, normalize)
    if fits(q, k, v):
        inputs = (q, k, v, log_decay, initial_state)
        return backward(grad_o, grad_state, o, *inputs, scale, normalize, None, lengths, values)
    wide = _augment(v, normalize)
    grad = grad_o
    if normalize:
        out, _ = _wide_forward(q, k, wide, log_decay, initial_state, scale, lengths)
        inverse = 1.0 / (out[..., -1:] + NORMALIZER_EPS)
        numerator = grad_o.float() * inverse
        grad = torch.cat((numerator, -(numerator * out[..., :-1]).sum(-1, keepdim=True) * inverse), -1)
    grads = _wide_backward(grad, grad_state, q, k, wide, log_decay, initial_state, scale, lengths)
    d_q, d_k, d_v, d_g, d_initial = grads
    return (
        d_q.to(q.dtype),
        d_k.to(k.dtype),
        d_v[..., : v.shape[3]].to(v.dtype),
        None if d_g is None or log_decay is None else d_g.to(log_decay.dtype),
        None if d_initial is None or initial_state is None else d_initial.to(initial_state.dtype),
    )


def _pad(x: Tensor, *sizes: int) -> Tensor:
    """Zeros after the last axes, up to ``sizes`` (last axis first)."""
    amounts = [amount for i, size in enumerate(sizes) for amount in (0, size - x.shape[-1 - i])]
    return torch.nn.functional.pad(x, amounts) if any(amounts) else x


def _augment(v: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.pad(v, (0, 1), value=1.0) if normalize else v


@dataclass(frozen=True)
class _Piece:
    """One block of keys against one block of values, padded to block widths."""

    keys: slice
    values: slice
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

    def cut_state(self, state: Tensor) -> Tensor:
        """This piece's part of a padded state's leading block."""
        return state[..., : self.keys.stop - self.keys.start, : self.values.stop - self.values.start]


def _pieces(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None
) -> Iterator[tuple[_Piece, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Every piece, with functions that pad values and states to its widths."""
    widths = block_widths(q, k, v)
    for i, j in itertools.product(range(0, k.shape[3], widths[-1]), range(0, v.shape[3], widths[-1])):
        keys, values = slice(i, min(i + widths[-1], k.shape[3])), slice(j, min(j + widths[-1], v.shape[3]))
        wide_k = next(width for width in widths if width >= keys.stop - i)
        wide_v = next(width for width in widths if width >= values.stop - j)

        def pad_value(x: Tensor, values: slice = values, width: int = wide_v) -> Tensor:
            return _pad(x[..., values], width)

        def pad_state(
            x: Tensor, keys: slice = keys, values: slice = values, sizes: tuple[int, int] = (wide_v, wide_k)
        ) -> Tensor:
            return _pad(x[..., keys, values], *sizes)

        gates = g if g is None or g.shape[-1] == 1 else _pad(g[..., keys], wide_k)
        start = None if state is None else pad_state(state)
        tensors = (_pad(q[..., keys], wide_k), _pad(k[..., keys], wide_k), pad_value(v), gates, start)
        yield _Piece(keys, values, tensors), pad_value, pad_state


def _wide_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float, lengths: Lengths
) -> tuple[Tensor, Tensor]:
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=torch.float32, device=q.device)
    leading = (k.shape[0] if lengths is None else len(lengths), k.shape[1])
    state = torch.empty((*leading, k.shape[3], v.shape[3]), dtype=torch.float32, device=q.device)
    for piece, _, _ in _pieces(q, k, v, g, initial):
        part, end = forward(*piece.tensors, scale, False, torch.float32, lengths)
        out[..., piece.values] += part[..., : out[..., piece.values].shape[-1]]
        state[:, :, piece.keys, piece.values] = piece.cut_state(end)
    return out, state


def _wide_backward(
    grad: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    scale: float,
    lengths: Lengths,
) -> Grads:
    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    def add(total: Tensor, part: Tensor) -> None:
        total += part[..., : total.shape[-1]]

    d_q, d_k, d_v = zeros(q), zeros(k), zeros(v)
    d_g, d_initial = None if g is None else zeros(g), None if initial is None else zeros(initial)
    for piece, pad_value, pad_state in _pieces(q, k, v, g, initial):
        ends = pad_state(grad_state)
        parts = backward(pad_value(grad), ends, None, *piece.tensors, scale, False, torch.float32, lengths)
        add(d_q[..., piece.keys], parts[0])
        add(d_k[..., piece.keys], parts[1])
        add(d_v[..., piece.values], parts[2])
        if d_g is not None and parts[3] is not None:
            add(d_g if d_g.shape[-1] == 1 else d_g[..., piece.keys], parts[3])
        if d_initial is not None and parts[4] is not None:
            d_initial[:, :, piece.keys, piece.values] = piece.cut_state(parts[4])
    return d_q, d_k, d_v, d_g, d_initial
