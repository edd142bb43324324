"""Where heads look, measured on the teacher: gates start with half-lives that fit, not with the same in every head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..linearization.methods import (
    HALF_LIVES,
    DecayGate,
    LinearMethod,
    half_life_bias,
    logits_of_half_lives,
    spread_half_lives,
)
from ..program import Program
from .instrument import beside
from .spread import alone
from .weights import columns_of, teacher_weights

LONGEST = 2048  # tokens of a window that are looked at
FAR = 4


class _Profile(nn.Module):
    """Adds up a site's softmax weights by distance, per KV head; the first token's, where heads rest, are left out."""

    def __init__(self, branch: LinearMethod, softmax: tuple[Any, ...], length: int) -> None:
        super().__init__()
        self.branch, self.softmax = branch, softmax
        self.total = torch.zeros(branch.shape.kv_heads, length, dtype=torch.float64)

    def forward(self, wanted: Tensor, site_q: Tensor, site_k: Tensor, *operands: Tensor) -> Tensor:
        v, kv_heads = operands[2], self.branch.shape.kv_heads
        mask = (*operands[4:], None)[0]  # no window stands beside these sites
        rows = torch.arange(v.shape[2], device=v.device)[:, None]
        for start, columns in columns_of(v, self.branch.shape.value_dim):
            weights = teacher_weights(self.softmax, site_q, site_k, columns, mask).float()
            keys = start + torch.arange(columns.shape[-1], device=v.device)
            if not start:
                weights[..., 0] = 0
            distances = (rows - keys).clamp(min=0).flatten()
            by_head = weights.sum(0).view(kv_heads, -1, *weights.shape[2:]).sum(1).flatten(1)
            found = torch.zeros(kv_heads, v.shape[2], device=v.device).index_add_(1, distances, by_head)
            self.total[:, : v.shape[2]] += found.double().cpu()
        return wanted.new_zeros(())


class _Nothing(nn.Module):
    def forward(self, wanted: Tensor, *_: Tensor) -> Tensor:
        return wanted.new_zeros(())


def half_lives(profile: Tensor, count: int, longest: float = HALF_LIVES[-1]) -> Tensor:
    """Distances that split each head's weights ``[heads, T]`` into ``count`` equal parts, ``[heads, count]``.

    No distance is farther than the windows were long, so every ``FAR``-th feature keeps its place in the even spread up
    to ``longest``: without them a student would start with no memory beyond its training length.
    """
    shares = profile.cumsum(-1) / profile.sum(-1, keepdim=True).clamp(min=1e-12)
    parts = ((torch.arange(count, dtype=profile.dtype) + 0.5) / count).expand(profile.shape[0], count)
    found = torch.searchsorted(shares.contiguous(), parts.contiguous()).double().clamp(1, longest)
    return torch.where(torch.arange(count) % FAR == FAR - 1, spread_half_lives(count, longest), found)


@torch.no_grad()
def calibrate(teacher: Program, student: Program, windows: Tensor, longest: float = HALF_LIVES[-1]) -> int:
    """Sets the biases of gates that nobody has trained yet; returns how many.

    Each feature of a KV head gets the half-life that is a quantile of the distances at which the teacher's query heads
    of that group look, over the windows ``[n, T]``; every ``FAR``-th keeps a place in the spread up to ``longest``.
    """
    with alone():
        fresh = {
            site.path: gate
            for site in student.sites
            if site.method != "softmax" and (gate := _fresh_gate(student, site.details["module"])) is not None
        }
        if not fresh or not len(windows):
            return 0
        softmax = {site.path: tuple(site.node.args[4:8]) for site in teacher.sites if site.node is not None}
        windows = windows[:, :LONGEST]
        profiles: dict[str, _Profile] = {}

        def wrap(path: str, branch: LinearMethod) -> nn.Module:
            if path not in fresh:
                return _Nothing()
            profiles[path] = _Profile(branch, softmax[path], windows.shape[1])
            return profiles[path]

        graph = beside(teacher, student, wrap, with_scores=True)
        for window in windows:
            graph(window[None].to(graph.device))
    for path, gate in fresh.items():
        gate.bias.copy_(logits_of_half_lives(half_lives(profiles[path].total, gate.features, longest)).flatten())
    return len(fresh)


def _fresh_gate(student: Program, module: str) -> DecayGate | None:
    """The gate of a site that stands alone and averages (where this was measured to help), if it is as it was made."""
    branch = student.graph_module.get_submodule(module)
    gate = getattr(branch, "gate", None)
    if not (isinstance(branch, LinearMethod) and branch.normalised and branch.mix is None):
        return None
    if not isinstance(gate, DecayGate):
        return None
    start = half_life_bias(gate.features).repeat(gate.kv_heads).to(gate.bias)
    return gate if torch.equal(gate.bias, start) else None
