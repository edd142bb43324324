"""Small, correct versions of other ways to split a sequence over ranks, with gradients, counting what they receive.

Ring Attention (arXiv 2310.01889), LASP-1's ring of states (arXiv 2404.02882), Ulysses (arXiv 2309.14509). Gathered keys
and values (LASP-2H) and gathered states (LASP-2) are lincompile's own, from ``passes/sharding/sites.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lincompile.kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from lincompile.kernels.linear_attention import segments
from lincompile.kernels.shapes import group_heads

ops = torch.ops.lincompile


@dataclass
class Wire:
    """The default group's point-to-point and all-to-all traffic; counts what this rank receives."""

    rank: int
    world: int
    messages: int = 0
    bytes: int = 0

    def received(self, messages: int, nbytes: int) -> None:
        self.messages += messages
        self.bytes += nbytes

    def shift(self, x: Tensor) -> Tensor:
        """Sends ``x`` to the next rank of the ring and receives the previous one's."""
        got, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
        jobs = [
            dist.P2POp(dist.isend, x, (self.rank + 1) % self.world),
            dist.P2POp(dist.irecv, got, (self.rank - 1) % self.world),
        ]
        for work in dist.batch_isend_irecv(jobs):
            work.wait()
        self.received(1, got.nbytes)
        return got

    def receive(self, like: Tensor, source: int) -> Tensor:
        got = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(got, source)
        self.received(1, got.nbytes)
        return got

    def all_to_all(self, x: Tensor) -> Tensor:
        """``[W, …]``: row i goes to rank i."""
        got = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(got, x.contiguous())
        self.received(self.world - 1, got.nbytes * (self.world - 1) // self.world)
        return got


class _Ring(torch.autograd.Function):
    """Causal softmax: keys and values go round the ring, outputs are merged by their log-sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, wire: Wire) -> Tensor:
        queries = group_heads(q, k.shape[1])
        out = torch.zeros(*queries.shape[:-1], v.shape[-1], dtype=q.dtype)
        total = queries.new_full((*queries.shape[:-1], 1), -torch.inf)
        both = torch.cat((k, v), -1)
        for step in range(wire.world):
            source = (wire.rank - step) % wire.world
            if source <= wire.rank:
                keys, values = both.split((k.shape[-1], v.shape[-1]), -1)
                scores = _scores(queries, keys, scale, causal=step == 0)
                part = scores.logsumexp(-1, keepdim=True)
                new = torch.logaddexp(total, part)
                seen = (scores - part).exp() @ values.unsqueeze(2)
                out = out * (total - new).exp() + seen * (part - new).exp()
                total = new
            if step < wire.world - 1:
                both = wire.shift(both)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.options = (scale, wire)
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        scale, wire = ctx.options
        queries, grad = group_heads(q, k.shape[1]), group_heads(grads[0], k.shape[1])
        delta = (grad * out).sum(-1, keepdim=True)
        both = torch.cat((k, v), -1)
        d_both, d_q = torch.zeros_like(both), torch.zeros_like(queries)
        for step in range(wire.world):
            source = (wire.rank - step) % wire.world
            if source <= wire.rank:
                keys, values = both.split((k.shape[-1], v.shape[-1]), -1)
                weights = (_scores(queries, keys, scale, causal=step == 0) - total).exp()
                d_scores = weights * (grad @ values.unsqueeze(2).transpose(-1, -2) - delta) * scale
                d_q += d_scores @ keys.unsqueeze(2)
                d_both[..., : k.shape[-1]] += (d_scores.transpose(-1, -2) @ queries).sum(2)
                d_both[..., k.shape[-1] :] += (weights.transpose(-1, -2) @ grad).sum(2)
            if step < wire.world - 1:
                both = wire.shift(both)
            d_both = wire.shift(d_both)  # after W steps the gradients are where their keys live
        d_k, d_v = d_both.split((k.shape[-1], v.shape[-1]), -1)
        return d_q.flatten(1, 2), d_k, d_v, None, None


def _scores(queries: Tensor, keys: Tensor, scale: float, causal: bool) -> Tensor:
    """``[B, Hkv, R, T, T]`` of one block of keys."""
    scores = queries @ keys.unsqueeze(2).transpose(-1, -2) * scale
    if causal:
        rows = torch.arange(queries.shape[3])
        scores = scores.masked_fill(rows[:, None] < rows[None, :], -torch.inf)
    return scores


def ring_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, wire: Wire) -> Tensor:
    """Causal softmax of this rank's slice ``[B, H, T, D]``."""
    out: Tensor = _Ring.apply(q, k, v, scale, wire)  # type: ignore[no-untyped-call]
    return out


class _Chain(torch.autograd.Function):
    """LASP-1: the state arrives from the previous rank, is updated, and goes on; backwards the other way."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, log_total: Tensor, wire: Wire) -> Tensor:
        before = wire.receive(own, wire.rank - 1) if wire.rank else torch.zeros_like(own)
        if wire.rank < wire.world - 1:
            dist.send((log_total.exp() * before + own).contiguous(), wire.rank + 1)
        ctx.save_for_backward(log_total, before)
        ctx.wire = wire
        return before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_total, before = ctx.saved_tensors
        wire = ctx.wire
        wanted = wire.receive(before, wire.rank + 1) if wire.rank < wire.world - 1 else torch.zeros_like(before)
        if wire.rank:
            dist.send((grads[0] + log_total.exp() * wanted).contiguous(), wire.rank - 1)
        return wanted, (wanted * log_total.exp() * before).sum(-1, keepdim=True), None


def lasp1(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, wire: Wire) -> Tensor:
    """Gated linear attention of this rank's slice, by a chain of states."""
    state, total = segments.summary(k, v, decay)
    assert total is not None
    before: Tensor = _Chain.apply(state, total, wire)  # type: ignore[no-untyped-call]
    own = ops.linear_attention(q, k, v, decay, None, scale, True, False)[0]
    queries = group_heads(q, k.shape[1]) * decay.cumsum(2).exp().unsqueeze(2)
    return own + (queries @ before.unsqueeze(2)).flatten(1, 2) * scale


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return wire.all_to_all(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.all_to_all(grads[0].contiguous()), None


def ulysses(q: Tensor, k: Tensor, v: Tensor, scale: float, wire: Wire) -> Tensor:
    """Causal softmax: slices of the sequence become slices of the heads, and back.

    Where there are fewer KV heads than ranks, they are repeated until each rank has one.
    """
    world = wire.world
    repeats = max(1, world // k.shape[1])
    if q.shape[1] % world or k.shape[1] * repeats % world:
        raise ValueError(f"Ulysses can't split {q.shape[1]} query and {k.shape[1]} KV heads over {world} ranks")

    def to_heads(x: Tensor) -> Tensor:
        """``[B, H, T, D] -> [B, H / W, W · T, D]``."""
        parts = x.unflatten(1, (world, -1)).transpose(0, 1)
        got: Tensor = _Exchange.apply(parts, wire)  # type: ignore[no-untyped-call]
        return got.permute(1, 2, 0, 3, 4).flatten(2, 3)

    keys, values = (x.repeat_interleave(repeats, 1) for x in (k, v))
    out = ops.softmax_attention(to_heads(q), to_heads(keys), to_heads(values), None, "causal", 0, scale, 0.0)
    parts = out.unflatten(2, (world, -1)).permute(2, 0, 1, 3, 4)
    back: Tensor = _Exchange.apply(parts, wire)  # type: ignore[no-untyped-call]
    return back.transpose(0, 1).flatten(1, 2)
