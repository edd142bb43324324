"""ALiBi (Press et al., arXiv 2108.12409): a bias of slope · key position, exactly in softmax, as a decay in GLA.

Softmax doesn't see what is the same for a whole row, so ``slope · (j − i)`` is ``slope · j``: one more feature, the
position, in every key, and ``slope / scale`` in every query. In linear attention a factor ``e^{−slope}`` for each step
is a decay: GLA's recurrence with ``log_decay = −slope``, one per head. The softmax's own ``e^{q·k}`` isn't reproduced
by that, as in every rewrite to GLA: the difference is reported, and distillation is what makes it small.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..graph import Builder, aten, get_attribute, tensor_of
from .methods import LinearMethod, SiteShape, keep_real
from .stretch import repeated

SLOPES = "lincompile_alibi"
MEASURED = 64  # tokens of the random sequence on which a site's error is measured


def with_positions(
    q: Node, k: Node, slopes: Sequence[float], scale: float, counted: Node | None, make: Builder
) -> tuple[Node, Node]:
    """``q [B, H, T, D]`` and ``k [B, Hkv, S, D]`` with one more feature each, whose product is the bias over scale.

    ``counted``, bool ``[B, S]``: positions count these tokens alone; None: all of them.
    """
    values = torch.tensor(slopes, dtype=tensor_of(q).dtype, device=tensor_of(q).device) / scale
    name = f"{SLOPES}_{zlib.crc32(repr((tuple(slopes), scale)).encode()):08x}"  # layers with the same slopes share it
    if not hasattr(make.graph_module, name):
        make.graph_module.register_buffer(name, values[None, :, None, None])
    head = make.attribute(name, get_attribute(make.graph_module, name))
    q_sizes = [make(aten.sym_size.int, q, axis) for axis in (0, 2)]
    k_sizes = [make(aten.sym_size.int, k, axis) for axis in (0, 2)]
    heads, kv_heads = int(tensor_of(q).shape[1]), int(tensor_of(k).shape[1])
    column_q = make(aten.expand.default, head, [q_sizes[0], heads, q_sizes[1], 1])
    if counted is None:
        at = make(aten.arange.default, k_sizes[1], dtype=tensor_of(k).dtype, device=tensor_of(k).device)
        at = make(aten.reshape.default, at, [1, 1, -1, 1])
    else:
        at = make(aten.to.dtype, make(aten.cumsum.default, counted, -1), tensor_of(k).dtype)
        at = make(aten.unsqueeze.default, make(aten.unsqueeze.default, at, 1), -1)
    column_k = make(aten.expand.default, at, [k_sizes[0], kv_heads, k_sizes[1], 1])
    return make(aten.cat.default, [q, column_q], -1), make(aten.cat.default, [k, column_k], -1)


def without_positions(q: Node, k: Node) -> tuple[Node, Node]:
    """What ``with_positions`` was given."""
    plain: list[Any] = []
    for node in (q, k):
        assert node.target is aten.cat.default and isinstance(node.args[0], (list, tuple))
        plain.append(node.args[0][0])
    return plain[0], plain[1]


@dataclass(frozen=True)
class AlibiShape(SiteShape):
    """A site with ALiBi; ``slopes``: what each KV head adds to the scores per key position (0 or more)."""

    slopes: tuple[float, ...] = ()


def decays(slopes: Sequence[float], kv_heads: int) -> tuple[float, ...] | str:
    """One slope per KV head, or the reason why these slopes of the query heads aren't decays."""
    groups = len(slopes) // kv_heads if len(slopes) % kv_heads == 0 else 1
    if len(slopes) == 1:  # one slope for all heads
        slopes, groups = [slopes[0]] * kv_heads, 1
    if len(slopes) != kv_heads * groups:
        return f"{len(slopes)} ALiBi slopes don't fit {kv_heads} KV heads"
    per_head = [slopes[head * groups : (head + 1) * groups] for head in range(kv_heads)]
    if any(not math.isclose(a, group[0], rel_tol=1e-5, abs_tol=1e-9) for group in per_head for a in group):
        return "query heads of one KV head have different ALiBi slopes, and the state of a KV head has one decay"
    if min(slopes) < 0:
        return f"a slope of {min(slopes):g} favours distant keys: as a decay it would grow without bound"
    return tuple(group[0] for group in per_head)


class AlibiGLA(LinearMethod):
    """GLA whose decay is ALiBi's: ``log_decay = −slope``, one per KV head, learned from there; no gate.

    ``out_scale`` starts at ``1 − e^{−slope}``, which turns the decayed sum over past values into their average.
    """

    method = "gla"

    def __init__(self, shape: SiteShape) -> None:
        super().__init__(shape)
        assert isinstance(shape, AlibiShape)
        slopes = torch.tensor(shape.slopes)
        self.slope = nn.Parameter(slopes.clone())
        share = (1 - torch.exp(-slopes)).clamp(min=1 / MEASURED).repeat_interleave(shape.groups)
        self.out_scale = nn.Parameter(share.reshape(-1, 1, 1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, repeats: Tensor | None = None
    ) -> Tensor:
        """See ``LinearMethod``; ``x`` isn't read."""
        log_decay = -self.slope.abs().reshape(1, -1, 1, 1).expand(v.shape[0], -1, v.shape[2], 1)
        log_decay, k = keep_real(log_decay, mask, head_axis=True), keep_real(k, mask, head_axis=True)
        if repeats is not None:
            k, log_decay = repeated(k, log_decay, repeats, None)
        out: Tensor = torch.ops.lincompile.linear_attention(q, k, v, log_decay, None, self.shape.scale, True, False)[0]
        return out * self.out_scale


def errors(method: AlibiGLA) -> dict[str, float]:
    """How far a fresh site is from the softmax it replaces, on random normal q, k, v of ``MEASURED`` tokens.

    ``decay``: largest difference between the decay over any distance and ``e^{bias}``. ``output``: relative error of
    the attention's output (L2), which distillation has to remove.
    """
    shape = method.shape
    assert isinstance(shape, AlibiShape)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, MEASURED, width, generator=generator)
        for heads, width in (
            (shape.heads, shape.head_dim),
            (shape.kv_heads, shape.head_dim),
            (shape.kv_heads, shape.value_dim),
        )
    )
    slopes = torch.tensor(shape.slopes)
    distance = torch.arange(MEASURED)[:, None] - torch.arange(MEASURED)[None, :]
    bias = -slopes.repeat_interleave(shape.groups)[:, None, None] * distance
    k_all, v_all = (y.repeat_interleave(shape.groups, 1) for y in (k, v))
    scores = (q @ k_all.transpose(-1, -2) * shape.scale + bias).masked_fill(distance < 0, -math.inf)
    wanted = scores.softmax(-1) @ v_all
    fresh = AlibiGLA(shape)
    with torch.no_grad():
        found = fresh.attend(q, k, v, v, None)
        steps = torch.arange(MEASURED)
        decay = (torch.exp(-fresh.slope[:, None] * steps) - torch.exp(-slopes[:, None] * steps)).abs().max()
    return {"decay": float(decay), "output": float((found - wanted).norm() / wanted.norm())}
