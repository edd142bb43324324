"""Linear attention with optional per-key or per-head decay: recurrent (the definition), chunkwise and step forms.

Gated linear attention of arXiv 2312.06635, with the ones-column normaliser of LAWCAT (arXiv 2509.18467), on
un-expanded KV heads. The chunkwise form never divides by a decay. Inside a chunk it either anchors both factors at
the chunk's middle (when the chunk's decay range is small, the usual case), or halves the chunk recursively so that
every factor is ``exp`` of a sum of non-positive numbers: decays down to ``-inf`` then stay exact, gradients too.

Shapes and dtypes are those of ``docs/architecture.md``: q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv],
log_decay [B, Hkv, T, D or 1], state [B, Hkv, D, Dv (+1 when normalised)].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import accumulator_dtype, group_heads
from .segments import chain, prefix_exclusive, suffix_exclusive, suffix_inclusive

NORMALIZER_EPS = 1e-10
CHUNK = 64
# exp(±30) squared is 1e26: factors and the masked upper triangle stay far from float32's 3e38.
ANCHOR_RANGE = 30.0

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: ``S_t = e^{g_t} ⊙ S_{t-1} + k_tᵀ v_t``, ``o_t = scale · q_t S_t``.

    Differentiable by plain autograd. Returns ``o [B, H, T, Dv]`` in v's dtype and the final state.
    """
    dtype = accumulator_dtype(q, k, v, log_decay, initial_state)
    queries = group_heads(q.to(dtype), k.shape[1]) * scale
    keys, values = k.to(dtype), _augment(v.to(dtype), normalize)
    state = _start(keys, values, initial_state)
    if not causal:
        state = state + keys.transpose(-1, -2) @ values
        return _finish(queries.flatten(1, 2) @ state.repeat_interleave(queries.shape[2], 1), v, normalize), state
    outputs = []
    for t in range(k.shape[2]):
        if log_decay is not None:
            state = state * log_decay[:, :, t, :, None].to(dtype).exp()
        state = state + keys[:, :, t, :, None] * values[:, :, t, None, :]
        outputs.append(torch.einsum("bgrd,bgde->bgre", queries[:, :, :, t], state).flatten(1, 2))
    out = torch.stack(outputs, 2) if outputs else queries.new_zeros(*q.shape[:3], values.shape[-1])
    return _finish(out, v, normalize), state


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """One token (T = 1): the decode form. Same shapes and results as the other forms."""
    dtype = accumulator_dtype(q, k, v, log_decay, initial_state)
    queries = group_heads(q.to(dtype), k.shape[1])[:, :, :, 0] * scale
    state = k.to(dtype).transpose(-1, -2) * _augment(v.to(dtype), normalize)
    if initial_state is not None:
        carried = initial_state.to(dtype)
        if log_decay is not None:
            carried = carried * log_decay.to(dtype).transpose(-1, -2).exp()
        state = state + carried
    return _finish((queries @ state).flatten(1, 2).unsqueeze(2), v, normalize), state


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Same function as ``recurrent``, vectorised over tokens; only the scan over chunks is a loop.

    ``chunk`` is a power of two. Returns contiguous ``o`` and the final state.
    """
    if causal and k.shape[2] == 1:
        return step(q, k, v, log_decay, initial_state, scale, normalize)
    if not causal:
        dtype = accumulator_dtype(q, k, v, initial_state)
        keys, values = k.to(dtype), _augment(v.to(dtype), normalize)
        total = _start(keys, values, initial_state) + keys.transpose(-1, -2) @ values
        queries = group_heads(q.to(dtype), k.shape[1]).flatten(2, 3) * scale
        return _finish((queries @ total).reshape(*q.shape[:3], -1), v, normalize), total
    run = _Run(q, k, v, log_decay, initial_state, scale, normalize, chunk)
    return _finish(run.merge(run.output()), v, normalize), run.states[:, :, -1].clone()


def chunkwise_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
    chunk: int = CHUNK,
) -> Grads:
    """Gradients of ``chunkwise`` for q, k, v, log_decay and initial_state (``None`` where the input is absent).

    Everything is recomputed from the inputs; no per-token matrix is kept between forward and backward.
    """
    if not causal:
        return _bidirectional_backward(grad_o, grad_state, q, k, v, initial_state, scale, normalize)
    run = _Run(q, k, v, log_decay, initial_state, scale, normalize, chunk)
    out = run.output() if normalize else None
    grad = run.split_queries(grad_o.to(run.dtype))
    if out is not None:
        grad = _finish_backward(grad, out)
    return run.backward(grad, grad_state.to(run.dtype))


def _bidirectional_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize: bool,
) -> Grads:
    dtype = accumulator_dtype(q, k, v, initial_state)
    keys, values = k.to(dtype), _augment(v.to(dtype), normalize)
    total = _start(keys, values, initial_state) + keys.transpose(-1, -2) @ values
    queries = group_heads(q.to(dtype), k.shape[1]).flatten(2, 3) * scale
    grad = group_heads(grad_o.to(dtype), k.shape[1]).flatten(2, 3)
    if normalize:
        grad = _finish_backward(grad, queries @ total)
    d_total = queries.transpose(-1, -2) @ grad + grad_state.to(dtype)
    d_q = (grad @ total.transpose(-1, -2)).reshape(q.shape) * scale
    d_k = values @ d_total.transpose(-1, -2)
    d_v = (keys @ d_total)[..., : v.shape[-1]]
    d_initial = None if initial_state is None else d_total.to(initial_state.dtype)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, d_initial


class _Run:
    """One causal problem cut into chunks: q [B, G, N, R, C, D], k, v, g [B, G, N, C, ·] with G kv heads, R = H / G."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        normalize: bool,
        chunk: int,
    ) -> None:
        self.inputs = (q, k, v, log_decay, initial_state)
        self.dtype = accumulator_dtype(q, k, v, log_decay, initial_state)
        self.scale = scale
        self.length = k.shape[2]
        self.size = min(chunk, 1 << max(self.length - 1, 0).bit_length())
        self.q = self.split_queries(q.to(self.dtype)) * scale
        self.k = self._split(k.to(self.dtype))
        self.v = self._split(_augment(v.to(self.dtype), normalize))
        self.g = None if log_decay is None else self._split(log_decay.to(self.dtype))
        self.decay = None if self.g is None else _ChunkDecay.of(self.g)
        self.k_out = self.k if self.decay is None else self.k * self.decay.to_end
        self.q_in = self.q if self.decay is None else self.q * self.decay.from_start.unsqueeze(3)
        self.mask = torch.ones(self.size, self.size, dtype=torch.bool, device=q.device).tril()
        self.states = self._scan(_start(k, self.v, initial_state).to(self.dtype))

    def _split(self, x: Tensor) -> Tensor:
        """``[..., T, F] -> [..., N, C, F]``, zero-padded: padded keys add nothing and padded decays are 1."""
        chunks = -(-self.length // self.size)
        padding = chunks * self.size - self.length
        if padding:
            x = F.pad(x, (0, 0, 0, padding))
        return x.reshape(*x.shape[:-2], chunks, self.size, x.shape[-1])

    def split_queries(self, x: Tensor) -> Tensor:
        """``[B, H, T, F] -> [B, G, N, R, C, F]``."""
        return self._split(group_heads(x, self.inputs[1].shape[1])).transpose(2, 3).contiguous()

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of ``split_queries``."""
        x = x.transpose(2, 3).flatten(3, 4)
        return x.flatten(1, 2)[:, :, : self.length]

    def _scan(self, state: Tensor) -> Tensor:
        """States before each chunk and, last, after all of them: ``[B, G, N + 1, D, E]``."""
        added = self.k_out.transpose(-1, -2) @ self.v
        passing = None if self.decay is None else self.decay.whole.unbind(2)
        return torch.stack(chain(added.unbind(2), passing, state), 2)

    def output(self) -> Tensor:
        """Un-normalised outputs ``[B, G, N, R, C, E]``."""
        shape = (*self.q.shape[:-1], self.v.shape[-1])
        out = (self.q_in.flatten(3, 4) @ self.states[:, :, :-1]).reshape(shape)
        if self.decay is None or self.decay.anchored is not None:
            q, k = self._anchored()
            return out + (self._scores(q, k) @ self.v).reshape(shape)
        for level in self._levels():
            part = (level.q.flatten(4, 5) @ level.k.transpose(-1, -2)) @ level.half(self.v, 0)
            level.query_half(out).add_(part.reshape(*level.q.shape[:-1], shape[-1]))
        return out.add_((self.q * self.k.unsqueeze(3)).sum(-1, keepdim=True) * self.v.unsqueeze(3))

    def _anchored(self) -> tuple[Tensor, Tensor]:
        """Queries and keys with the chunk's decay factored about its middle row."""
        if self.decay is None or self.decay.anchored is None:
            return self.q, self.k
        return self.q * self.decay.anchored.exp().unsqueeze(3), self.k * (-self.decay.anchored).exp()

    def _scores(self, left: Tensor, right: Tensor) -> Tensor:
        """Masked ``left rightᵀ``, as ``[B, G, N, R·C, C]``. Selected, not multiplied: the upper half may overflow."""
        scores = left.flatten(3, 4) @ right.transpose(-1, -2)
        shape = (*left.shape[:-1], right.shape[-2])
        return scores.reshape(shape).masked_fill_(~self.mask, 0.0).flatten(3, 4)

    def _levels(self) -> list[_Level]:
        """Halvings of the chunk, from halves of C/2 tokens down to single tokens."""
        assert self.g is not None
        return [_Level.of(self.q, self.k, self.g, self.size >> i) for i in range(1, self.size.bit_length())]

    def backward(self, grad: Tensor, grad_state: Tensor) -> Grads:
        """Gradients of the un-normalised outputs ``grad [B, G, N, R, C, E]`` and of the final state."""
        flat = grad.flatten(3, 4)
        before = self.states[:, :, :-1]
        d_q_in = (flat @ before.transpose(-1, -2)).reshape(self.q.shape)
        d_states = self._reverse_scan(self.q_in.flatten(3, 4).transpose(-1, -2) @ flat, grad_state)
        after = d_states[:, :, 1:]
        d_k_out = self.v @ after.transpose(-1, -2)
        d_v = self.k_out @ after
        d_q, d_k, d_g = d_q_in, d_k_out, None
        if self.decay is not None and self.g is not None:
            d_q, d_k = d_q * self.decay.from_start.unsqueeze(3), d_k * self.decay.to_end
            d_prefix = (self.q_in * d_q_in).sum(3)
            d_prefix[..., -1, :] += (self.decay.whole * before * after).sum(-1)
            d_g = suffix_inclusive(d_prefix) + prefix_exclusive(self.k_out * d_k_out)
        if self.decay is None or self.decay.anchored is not None:
            left, right = self._anchored()
            d_v = d_v + self._scores(left, right).transpose(-1, -2) @ flat
            d_scores = self._scores(grad, self.v)
            d_left, d_right = (d_scores @ right).reshape(left.shape), d_scores.transpose(-1, -2) @ left.flatten(3, 4)
            if self.decay is not None and self.decay.anchored is not None and d_g is not None:
                # The anchor itself has no gradient: the scores don't depend on where it is.
                d_g = d_g + suffix_inclusive((left * d_left).sum(3) - right * d_right)
                d_left, d_right = (
                    d_left * self.decay.anchored.exp().unsqueeze(3),
                    d_right * (-self.decay.anchored).exp(),
                )
            d_q, d_k = d_q + d_left, d_k + d_right
        else:
            assert d_g is not None
            self._levels_backward(grad, d_q, d_k, d_v, d_g)
        return self._to_inputs(d_q, d_k, d_v, d_g, d_states[:, :, 0])

    def _levels_backward(self, grad: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_g: Tensor) -> None:
        """Add the recursive halves' gradients in place (``d_g`` still one value per key channel)."""
        for level in self._levels():
            part = level.query_half(grad).flatten(4, 5)
            left, v_half = level.q.flatten(4, 5), level.half(self.v, 0)
            scores = left @ level.k.transpose(-1, -2)
            d_scores = part @ v_half.transpose(-1, -2)
            d_left = (d_scores @ level.k).reshape(level.q.shape)
            d_right = d_scores.transpose(-1, -2) @ left
            level.half(d_v, 0).add_(scores.transpose(-1, -2) @ part)
            level.query_half(d_q).add_(d_left * level.from_middle.unsqueeze(4))
            level.half(d_k, 0).add_(d_right * level.to_middle)
            level.half(d_g, 1).add_(suffix_inclusive((level.q * d_left).sum(4)))
            level.half(d_g, 0).add_(prefix_exclusive(level.k * d_right))
        weight = (grad * self.v.unsqueeze(3)).sum(-1, keepdim=True)
        d_q.add_(weight * self.k.unsqueeze(3))
        d_k.add_((weight * self.q).sum(3))
        d_v.add_(((self.q * self.k.unsqueeze(3)).sum(-1, keepdim=True) * grad).sum(3))

    def _reverse_scan(self, added: Tensor, grad_state: Tensor) -> Tensor:
        passing = None if self.decay is None else self.decay.whole.unbind(2)[::-1]
        return torch.stack(chain(added.unbind(2)[::-1], passing, grad_state)[::-1], 2)

    def _to_inputs(self, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_g: Tensor | None, d_initial: Tensor) -> Grads:
        q, k, v, log_decay, initial_state = self.inputs
        grad_g = None
        if log_decay is not None and d_g is not None:
            d_g = d_g.flatten(2, 3)[:, :, : self.length]
            grad_g = (d_g if log_decay.shape[-1] == d_g.shape[-1] else d_g.sum(-1, keepdim=True)).to(log_decay.dtype)
        return (
            (self.merge(d_q) * self.scale).to(q.dtype),
            d_k.flatten(2, 3)[:, :, : self.length].to(k.dtype),
            d_v.flatten(2, 3)[:, :, : self.length, : v.shape[-1]].to(v.dtype),
            grad_g,
            None if initial_state is None else d_initial.to(initial_state.dtype),
        )


@dataclass(frozen=True)
class _ChunkDecay:
    """Decay factors of every chunk; ``anchored`` (log) is None where the range is too wide for one anchor."""

    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    anchored: Tensor | None

    @staticmethod
    def of(g: Tensor) -> _ChunkDecay:
        prefix = g.cumsum(-2)
        anchored = prefix - prefix[..., prefix.shape[-2] // 2, None, :]
        # NaN (from -inf minus -inf) and +inf both fail this comparison.
        narrow = bool(anchored.abs().amax() <= ANCHOR_RANGE) if anchored.numel() else True
        to_end = suffix_exclusive(g).exp()
        return _ChunkDecay(prefix.exp(), to_end, prefix[..., -1, :, None].exp(), anchored if narrow else None)


@dataclass(frozen=True)
class _Level:
    """Blocks of ``2 · half_size`` tokens: late-half queries and early-half keys, decayed to the block's middle."""

    half_size: int
    q: Tensor  # [B, G, N, M, R, c, D]
    k: Tensor  # [B, G, N, M, c, D]
    from_middle: Tensor
    to_middle: Tensor

    @staticmethod
    def of(q: Tensor, k: Tensor, g: Tensor, half_size: int) -> _Level:
        late, early = _half(g, half_size, 1), _half(g, half_size, 0)
        from_middle, to_middle = late.cumsum(-2).exp(), suffix_exclusive(early).exp()
        queries = _query_half(q, half_size) * from_middle.unsqueeze(4)
        return _Level(half_size, queries, _half(k, half_size, 0) * to_middle, from_middle, to_middle)

    def half(self, x: Tensor, which: int) -> Tensor:
        return _half(x, self.half_size, which)

    def query_half(self, x: Tensor) -> Tensor:
        return _query_half(x, self.half_size)


def _half(x: Tensor, size: int, which: int) -> Tensor:
    """A view of the early (0) or late (1) halves: ``[B, G, N, C, F] -> [B, G, N, C / 2c, c, F]``."""
    return x.view(*x.shape[:3], -1, 2, size, x.shape[-1])[:, :, :, :, which]


def _query_half(x: Tensor, size: int) -> Tensor:
    """A view of the late halves: ``[B, G, N, R, C, F] -> [B, G, N, C / 2c, R, c, F]``."""
    return x.view(*x.shape[:4], -1, 2, size, x.shape[-1])[:, :, :, :, :, 1].transpose(3, 4)


def _augment(v: Tensor, normalize: bool) -> Tensor:
    return F.pad(v, (0, 1), value=1.0) if normalize else v


def _start(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(v.dtype)
    return v.new_zeros(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1])


def _finish(out: Tensor, v: Tensor, normalize: bool) -> Tensor:
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + NORMALIZER_EPS)
    return out.to(v.dtype).contiguous()


def _finish_backward(grad: Tensor, out: Tensor) -> Tensor:
    """From the gradient of ``o_v / (o_1 + eps)`` to that of ``[o_v, o_1]``."""
    inverse = 1.0 / (out[..., -1:] + NORMALIZER_EPS)
    d_numerator = grad * inverse
    return torch.cat((d_numerator, -(d_numerator * out[..., :-1]).sum(-1, keepdim=True) * inverse), -1)
