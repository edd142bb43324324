"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464): recurrent, chunkwise (WY form) and its gradients.

``S_t = e^{g_t} S_{t-1} + β_t k_tᵀ (v_t - k_t e^{g_t} S_{t-1})``, ``o_t = scale · q_t S_t``, on un-expanded KV heads:
q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], beta [B, Hkv, T], log_decay [B, Hkv, T, 1], state [B, Hkv, D, Dv].

Inside a chunk the corrected values ``u`` solve ``(I + L) u = β v - β e^{P} k S`` with L strictly lower triangular.
Pairwise decays are sums of the steps between two tokens, never differences of prefix sums, so ``-inf`` is safe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import accumulator_dtype, group_heads

CHUNK = 64

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def scan_forward(state: Tensor, u_local: Tensor, w: Tensor, k_out: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: ``u = u_local − w S``, ``S ← whole · S + k_outᵀ u``.

    state ``[B, G, D, Dv]``, u_local ``[B, G, N, C, Dv]``, w and k_out ``[B, G, N, C, D]``, whole ``[B, G, N, 1, 1]``.
    Returns the states before each chunk and after the last, ``[B, G, N + 1, D, Dv]``, and u.
    """
    written, states, us = k_out.transpose(-1, -2), [state], []
    for n in range(w.shape[2]):
        us.append(u_local[:, :, n] - w[:, :, n] @ state)
        state = whole[:, :, n] * state + written[:, :, n] @ us[-1]
        states.append(state)
    return torch.stack(states, 2), torch.stack(us, 2) if us else u_local


def scan_backward(
    d_state: Tensor, d_u_local: Tensor, d_before: Tensor, w: Tensor, k_out: Tensor, whole: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``scan_forward``, last chunk first: ``du = du_local + k_out dS``,
    ``dS ← whole · dS + d_before − wᵀ du``.

    d_before ``[B, G, N, D, Dv]`` is what the outputs read from the state before each chunk. Returns du
    ``[B, G, N, C, Dv]``, the gradients of the states after each chunk ``[B, G, N, D, Dv]``, and of the first state.
    """
    d_us, afters = [], []
    for n in reversed(range(w.shape[2])):
        afters.append(d_state)
        d_us.append(d_u_local[:, :, n] + k_out[:, :, n] @ d_state)
        d_state = whole[:, :, n] * d_state + d_before[:, :, n] - w[:, :, n].transpose(-1, -2) @ d_us[-1]
    if not d_us:
        return d_u_local, d_before, d_state
    return torch.stack(d_us[::-1], 2), torch.stack(afters[::-1], 2), d_state


@dataclass(frozen=True)
class Scans:
    """The part that goes from chunk to chunk; a GPU has kernels for it (``triton.py``)."""

    forward: Callable[..., tuple[Tensor, Tensor]] = scan_forward
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = scan_backward


LOOPS = Scans()


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; differentiable by plain autograd. Returns ``o [B, H, T, Dv]`` and the state."""
    dtype = accumulator_dtype(q, k, v, beta, log_decay, initial_state)
    queries = group_heads(q.to(dtype), k.shape[1]) * scale
    keys, values, rates = k.to(dtype), v.to(dtype), beta.to(dtype)
    state = _start(keys, values, initial_state)
    outputs = []
    for t in range(k.shape[2]):
        if log_decay is not None:
            state = state * log_decay[:, :, t, :, None].to(dtype).exp()
        key = keys[:, :, t, None]
        correction = rates[:, :, t, None, None] * (values[:, :, t, None] - key @ state)
        state = state + key.transpose(-1, -2) @ correction
        outputs.append((queries[:, :, :, t] @ state).flatten(1, 2))
    out = torch.stack(outputs, 2) if outputs else queries.new_zeros(*q.shape[:3], v.shape[-1])
    return out.to(v.dtype), state


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token (T = 1): the decode form."""
    out, state = recurrent(q, k, v, beta, log_decay, initial_state, scale)
    return out.contiguous(), state


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk: int = CHUNK,
    scans: Scans = LOOPS,
) -> tuple[Tensor, Tensor]:
    """Same function as ``recurrent``, vectorised over tokens; only the scan over chunks is a loop."""
    if k.shape[2] == 1:
        return step(q, k, v, beta, log_decay, initial_state, scale)
    run = _Run(q, k, v, beta, log_decay, initial_state, scale, chunk, scans)
    out = run.q_in.flatten(3, 4) @ run.states[:, :, :-1] + run.scores @ run.u
    return run.merge(out).to(v.dtype).contiguous(), run.states[:, :, -1].clone()


def chunkwise_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk: int = CHUNK,
    scans: Scans = LOOPS,
) -> Grads:
    """Gradients for q, k, v, beta, log_decay, initial_state (None where absent); the forward is recomputed."""
    run = _Run(q, k, v, beta, log_decay, initial_state, scale, chunk, scans)
    return run.backward(run.split_queries(grad_o.to(run.dtype)).flatten(3, 4), grad_state.to(run.dtype))


class _Run:
    """One problem cut into chunks: q [B, G, N, R, C, D]; k, v [B, G, N, C, ·]; beta and P [B, G, N, C, 1]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        chunk: int,
        scans: Scans,
    ) -> None:
        self.scans = scans
        self.inputs = (q, k, v, beta, log_decay, initial_state)
        self.dtype = accumulator_dtype(q, k, v, beta, log_decay, initial_state)
        self.scale, self.length = scale, k.shape[2]
        self.size = min(chunk, max(self.length, 1))
        self.q = self.split_queries(q.to(self.dtype)) * scale
        self.k, self.v = self._split(k.to(self.dtype)), self._split(v.to(self.dtype))
        self.beta = self._split(beta.to(self.dtype).unsqueeze(-1))
        g = torch.zeros_like(beta).unsqueeze(-1) if log_decay is None else log_decay
        self.g = self._split(g.to(self.dtype))
        ones = torch.ones(self.size, self.size, dtype=torch.bool, device=q.device)
        self.lower, self.strict = ones.tril(), ones.tril(-1)
        self.between = self._pairwise_decay()
        self.from_start = self.g.cumsum(-2).exp()
        self.to_end = self.between[..., -1, :, None]
        self.k_t = self.k.transpose(-1, -2)
        self.gram = self.k @ self.k_t
        identity = torch.eye(self.size, dtype=self.dtype, device=q.device)
        self.system = identity + (self.beta * self.gram * self.between).masked_fill(~self.strict, 0.0)
        both = torch.cat((self.beta * self.v, self.beta * self.from_start * self.k), -1)
        solved = torch.linalg.solve_triangular(self.system, both, upper=False, unitriangular=True)
        self.u_local, self.w = solved.split((self.v.shape[-1], self.k.shape[-1]), -1)
        self.k_out = self.k * self.to_end
        self.q_in = self.q * self.from_start.unsqueeze(3)
        self.whole = self.from_start[..., -1:, :]
        start = _start(self.k[:, :, 0], self.v, initial_state)
        self.states, self.u = scans.forward(start, self.u_local, self.w, self.k_out, self.whole)
        dots = (self.q.flatten(3, 4) @ self.k_t).reshape(*self.q.shape[:-1], self.size)
        self.dots = dots
        self.scores = (dots * self.between.unsqueeze(3)).flatten(3, 4)

    def _split(self, x: Tensor) -> Tensor:
        chunks = -(-self.length // self.size)
        x = F.pad(x, (0, 0, 0, chunks * self.size - self.length))
        return x.reshape(*x.shape[:-2], chunks, self.size, x.shape[-1])

    def split_queries(self, x: Tensor) -> Tensor:
        """``[B, H, T, F] -> [B, G, N, R, C, F]``."""
        return self._split(group_heads(x, self.inputs[1].shape[1])).transpose(2, 3).contiguous()

    def merge(self, x: Tensor) -> Tensor:
        """``[B, G, N, R·C, F] -> [B, H, T, F]``."""
        x = x.reshape(*self.q.shape[:-1], x.shape[-1]).transpose(2, 3).flatten(3, 4)
        return x.flatten(1, 2)[:, :, : self.length]

    def _pairwise_decay(self) -> Tensor:
        """``exp(g_{j+1} + … + g_i)`` for i ≥ j, else 0: ``[B, G, N, C, C]``, by running sums down each column."""
        steps = self.g.expand(*self.g.shape[:-1], self.size).masked_fill(~self.strict, 0.0)
        return steps.cumsum(-2).exp().masked_fill(~self.lower, 0.0)

    def backward(self, grad: Tensor, grad_state: Tensor) -> Grads:
        """``grad [B, G, N, R·C, Dv]``."""
        before = self.states[:, :, :-1]
        d_u_local = self.scores.transpose(-1, -2) @ grad
        d_before_local = self.q_in.flatten(3, 4).transpose(-1, -2) @ grad
        d_u, after, d_state = self.scans.backward(grad_state, d_u_local, d_before_local, self.w, self.k_out, self.whole)
        if not d_u.shape[2]:
            return self._to_inputs(self.q, self.k, self.v, self.beta, self.g, d_state)
        d_q_in = (grad @ before.transpose(-1, -2)).reshape(self.q.shape)
        d_q = d_q_in * self.from_start.unsqueeze(3)
        d_from_start = (self.q * d_q_in).sum((3, 5)).unsqueeze(-1)
        d_from_start[..., -1:, :] += (before * after).sum((-1, -2))[..., None, None]
        # Through the triangular solve: r = β v - β e^P k S, (I + L) u = r.
        d_r = torch.linalg.solve_triangular(self.system.transpose(-1, -2), d_u, upper=True, unitriangular=True)
        read = d_r @ before.transpose(-1, -2)
        d_v = self.beta * d_r
        d_k = -self.beta * self.from_start * read
        d_beta = (d_r * self.v).sum(-1, keepdim=True) - self.from_start * (self.k * read).sum(-1, keepdim=True)
        d_from_start -= self.beta * (self.k * read).sum(-1, keepdim=True)
        d_system = -(d_r @ self.u.transpose(-1, -2)).masked_fill(~self.strict, 0.0)
        d_beta += (d_system * self.gram * self.between).sum(-1, keepdim=True)
        d_gram = self.beta * d_system * self.between
        d_between = self.beta * d_system * self.gram
        d_k = d_k + d_gram @ self.k + d_gram.transpose(-1, -2) @ self.k
        # Through the local scores and the state written at the chunk's end.
        d_scores = (grad @ self.u.transpose(-1, -2)).reshape(self.dots.shape)
        d_dots = (d_scores * self.between.unsqueeze(3)).flatten(3, 4)
        d_between = d_between + (d_scores * self.dots).sum(3)
        d_q = d_q + (d_dots @ self.k).reshape(self.q.shape)
        d_k = d_k + d_dots.transpose(-1, -2) @ self.q.flatten(3, 4)
        written = self.u @ after.transpose(-1, -2)
        d_k = d_k + self.to_end * written
        d_between[..., -1, :] += (self.k * written).sum(-1)
        d_prefix = d_from_start * self.from_start
        pairs = d_between * self.between
        # Step m lies between j and i exactly when j < m ≤ i.
        crossing = F.pad(pairs[..., :-1], (1, 0)).cumsum(-1).masked_fill(~self.lower, 0.0)
        d_g = d_prefix.flip(-2).cumsum(-2).flip(-2) + crossing.sum(-2).unsqueeze(-1)
        return self._to_inputs(d_q, d_k, d_v, d_beta, d_g, d_state)

    def _to_inputs(self, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_beta: Tensor, d_g: Tensor, d_s: Tensor) -> Grads:
        q, k, v, beta, log_decay, initial_state = self.inputs
        length = self.length
        return (
            (self.merge(d_q.flatten(3, 4)) * self.scale).to(q.dtype),
            d_k.flatten(2, 3)[:, :, :length].to(k.dtype),
            d_v.flatten(2, 3)[:, :, :length].to(v.dtype),
            d_beta.flatten(2, 4)[:, :, :length].to(beta.dtype),
            None if log_decay is None else d_g.flatten(2, 3)[:, :, :length].to(log_decay.dtype),
            None if initial_state is None else d_s.to(initial_state.dtype),
        )


def _start(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(k.dtype)
    return k.new_zeros(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1])
