"""What must be left alone, with the reason: attention that isn't canonical, or can't be shown to be at every length.

All cases are sites of one module, so that one export serves them. Each case is a function of q, k, v ``[B, H, T, D]``
and of the module's other inputs; ``REFUSED`` gives the kind and a part of the reason that its site must report, and
``PROVED`` the kind and window of the look-alikes that are canonical after all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program

HEADS, DIM = 4, 4
INF = float("inf")


@dataclass
class Inputs:
    """What a case may read besides q, k and v."""

    tokens: Tensor
    position_ids: Tensor
    memory: Tensor
    parameter: Tensor
    table: Tensor


Case = Callable[[Tensor, Tensor, Tensor, Inputs], Tensor]


def distance(q: Tensor) -> Tensor:
    position = torch.arange(q.shape[2], device=q.device)
    return position[:, None] - position[None, :]


def raw(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * DIM**-0.5


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    return attend(raw(q, k).masked_fill(~allowed, -INF), v)


def causal(q: Tensor) -> Tensor:
    return distance(q) >= 0


def mask_case(allowed: Callable[[Tensor], Tensor]) -> Case:
    """Dense softmax with a mask that is a function of ``query − key`` distance."""
    return lambda q, k, v, _: masked(q, k, v, allowed(distance(q)))


def sdpa_case(mask: Callable[[Tensor], Tensor]) -> Case:
    return lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(distance(q)))


def score_case(change: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """Causal softmax over ``change(scores, distance)``."""
    return lambda q, k, v, _: attend(change(raw(q, k), distance(q)).masked_fill(~causal(q), -INF), v)


def probability_case(change: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """Causal softmax whose probabilities go through ``change(probabilities, distance)`` before v."""
    return lambda q, k, v, _: change(raw(q, k).masked_fill(~causal(q), -INF).softmax(-1), distance(q)) @ v


def learned(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return attend((raw(q, k) + i.parameter[:, None, None]).masked_fill(~causal(q), -INF), v)


def learned_scale(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return masked(q * 2, k, v, causal(q)) + attend((raw(q, k) * i.parameter.exp()[0]).masked_fill(~causal(q), -INF), v)


def data_scale(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return attend(raw(q, k) * i.memory.abs().mean(), v)


def data_dependent(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return masked(q, k, v, (i.tokens != 0)[:, None, None, :])


def prefix_of_types(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return masked(q, k, v, causal(q) | (i.tokens == 1)[:, None, None, :])


def packed(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    document = (i.position_ids == 0).cumsum(-1)
    return masked(q, k, v, causal(q) & (document[:, None, :, None] == document[:, None, None, :]))


def escapes(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    p = raw(q, k).softmax(-1)
    return p @ v + p.mean(-1, keepdim=True)


def scores_escape(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    scores = raw(q, k)
    return attend(scores, v) + scores.mean(-1, keepdim=True)


def talking_before(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    mix = torch.eye(HEADS) + i.parameter[:, None]
    return attend(F.linear(raw(q, k).permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2), v)


def talking_after(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    mix = torch.eye(HEADS) + i.parameter[:, None]
    return F.linear(raw(q, k).softmax(-1).permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    scores = raw(q, k).masked_fill(~causal(q), -INF)
    sink = i.parameter.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    return attend((raw(q, k) - slopes[:, None, None] * distance(q)).masked_fill(~causal(q), -INF), v)


def random_bias(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return attend(raw(q, k) + torch.rand(q.shape[2], q.shape[2]), v)


def table_bias(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return attend(raw(q, k) + i.table[: q.shape[2], : q.shape[2]], v)


def per_head_window(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    windows = torch.tensor([3, 4, 5, 6])[:, None, None]
    return masked(q, k, v, (distance(q) >= 0) & (distance(q) < windows))


def far_per_head_window(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    windows = torch.tensor([3000, 4000, 5000, 6000])[:, None, None]
    return masked(q, k, v, (distance(q) >= 0) & (distance(q) < windows))


def per_batch(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    row = torch.arange(q.shape[0])[:, None, None, None]
    return masked(q, k, v, causal(q) & ((row < 100) | (distance(q) < 3)))


def growing_window(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return masked(q, k, v, causal(q) & (distance(q) < q.shape[2] + 5 - q.shape[2] // 50))


def long_only_window(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    position = torch.arange(q.shape[2])
    return masked(q, k, v, causal(q) & (position[None, :] >= q.shape[2] - 5000))


def log_length_scale(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    length = torch.full((), q.shape[2], dtype=torch.float32)
    return attend((raw(q, k) * (length / 60000).clamp(min=1.0)).masked_fill(~causal(q), -INF), v)


def position_scale(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    position = torch.arange(q.shape[2])[:, None]
    return attend((raw(q, k) * torch.log(1 + position // 4096 + 1.7182818)).masked_fill(~causal(q), -INF), v)


def written_mask(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2])
    mask[:, 1:3].fill_(-INF)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def top_k(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    scores = raw(q, k)
    return masked(q, k, v, scores >= scores.topk(2, dim=-1).values[..., -1:])


def wrong_axis(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return raw(q, k).softmax(-2) @ v


def relu_scores(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return F.relu(raw(q, k)) @ v


def dropout(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return F.dropout(raw(q, k).softmax(-1), 0.5, training=True) @ v


def sdpa_dropout(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)


def top_left(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    key = i.memory.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, key, key, is_causal=True)


def top_left_dense(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    key = i.memory.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    allowed = torch.ones(q.shape[2], key.shape[2], dtype=torch.bool).tril()
    return masked(q, key, key, allowed)


def bottom_right(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    key, value = (torch.cat([x, x], 2) for x in (k, v))
    seen = torch.arange(key.shape[2]) <= torch.arange(q.shape[2])[:, None] + q.shape[2]
    return masked(q, key, value, seen)


def far_cross(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    key = i.memory.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    return masked(q, key, key, (torch.arange(key.shape[2]) < 5000)[None, :])


def over_the_batch(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    q, k, v = (x.transpose(0, 2) for x in (q, k, v))
    return masked(q, k, v, (distance(q) >= 0) & (distance(q) < 50) | (distance(q) == 60)).transpose(0, 2)


REFUSED: dict[str, tuple[Case, str, str]] = {
    "random": (random_bias, "random", "random numbers"),
    "learned": (learned, "learned", "sites.learned.parameter"),
    "learned-scale": (learned_scale, "learned", "sites.learned-scale.parameter"),
    "data-scale": (data_scale, "data-dependent", "depends on data"),
    "toeplitz": (score_case(lambda s, d: s - d.abs().float().sqrt()), "causal", "position bias .*toeplitz"),
    "alibi": (alibi, "causal", "position bias .*alibi"),
    "prefix-lm": (
        mask_case(lambda d: (d >= 0) | (d + 4 > torch.arange(d.shape[0])[:, None])),
        "prefix-lm-4",
        "prefix-lm",
    ),
    "anticausal": (mask_case(lambda d: d <= 0), "anticausal", "anticausal"),
    "strided": (mask_case(lambda d: (d >= 0) & (d % 3 == 0)), "strided-3", "strided"),
    "no-self": (mask_case(lambda d: d > 0), "no-self", "no-self"),
    "chunked": (mask_case(lambda d: _same_chunk(d, 4) & (d >= 0)), "chunked-4", "chunked"),
    "both-sides": (mask_case(lambda d: (d < 4) & (d > -4)), "bidirectional-window-4", "bidirectional"),
    "two-ahead": (mask_case(lambda d: torch.ones_like(d).tril(2) > 0), "arbitrary", "arbitrary"),
    "data-dependent": (data_dependent, "data-dependent", "reads the input 'tokens'"),
    "prefix-by-token": (prefix_of_types, "data-dependent", "reads the input 'tokens'"),
    "packed": (packed, "packed", "packed sequences"),
    "escapes": (escapes, "escapes", "probabilities are used elsewhere"),
    "scores-escape": (scores_escape, "escapes", "scores are used elsewhere"),
    "talking-before": (talking_before, "talking-heads", "before softmax"),
    "talking-after": (talking_after, "talking-heads", "after softmax"),
    "sinks": (sinks, "sinks", "attention sink"),
    "relu": (relu_scores, "not-softmax", "relu, not softmax"),
    "wrong-axis": (wrong_axis, "softmax-axis", "not over the keys"),
    "dropout": (dropout, "dropout", "dropout is active"),
    "sdpa-dropout": (sdpa_dropout, "dropout", "dropout 0.25 is active"),
    "top-left": (top_left, "causal-top-left", "different lengths"),
    "bottom-right": (bottom_right, "arbitrary", "not full, causal or sliding"),
    "top-left-dense": (top_left_dense, "arbitrary", "not full, causal or sliding"),
    "negative-scale": (score_case(lambda s, d: -s), "negative-scale", "isn't positive"),
    "clamped": (score_case(lambda s, d: s.clamp(min=-50.0)), "unknown-scores", "something other than a scale"),
    "capped-far": (score_case(lambda s, d: 50 * F.hardtanh(s / 16 / 50)), "unknown-scores", "hardtanh|clamp|near 1000"),
    "squared": (score_case(lambda s, d: s * s), "unknown-scores", "mul"),
    "threshold": (score_case(lambda s, d: torch.where(s > 0, s, -INF)), "unknown-scores", "gt"),
    "zeros-hidden": (score_case(lambda s, d: s.masked_fill(s == 0, -INF)), "unknown-scores", "eq"),
    "top-k": (top_k, "data-dependent", "depends on data"),
    # looks canonical at every length that a probe reaches
    "far-both-sides": (mask_case(lambda d: (d < 4096) & (d > -4096)), "bidirectional-window-4096", "bidirectional"),
    "far-distance": (mask_case(lambda d: d.abs() < 100_000), "unprovable", "abs"),
    "far-prefix": (mask_case(lambda d: (d >= 0) | (torch.arange(d.shape[0])[None, :] > 5000)), "arbitrary", "not full"),
    "far-chunk": (mask_case(lambda d: _same_chunk(d, 8192) & (d >= 0)), "unprovable", "floor_divide|div.*mode"),
    "far-stride": (mask_case(lambda d: (d >= 0) & (d % 4096 != 4095)), "unprovable", "remainder"),
    "far-band": (mask_case(lambda d: (d >= 0) & ((d < 5000) | (d > 5010))), "arbitrary", "not full"),
    "far-rows": (mask_case(lambda d: (d >= 0) & (torch.arange(d.shape[0])[:, None] != 5001)), "arbitrary", "not full"),
    "far-float": (mask_case(lambda d: (d >= 0) & (d * 0.001 < 5.0)), "unprovable", "mul"),
    "far-shift": (mask_case(lambda d: (d >= 0) & (d >> 12 == 0)), "unprovable", "shift"),
    "far-bias": (score_case(lambda s, d: s - (d - 4096).clamp(min=0)), "unprovable", "clamp"),
    "far-zeroed": (score_case(lambda s, d: s * (d < 4096)), "unknown-scores", "scaled differently"),
    "far-heads": (far_per_head_window, "per-head", "per-head"),
    "far-keys": (far_cross, "arbitrary", "not full"),
    "half-precision": (mask_case(lambda d: (d.bfloat16() > -0.5) & (d >= 0)), "unprovable", "rounds"),
    "per-head": (per_head_window, "per-head", "per-head"),
    "per-batch": (per_batch, "per-batch", "rows of a batch"),
    "growing-window": (growing_window, "length-dependent", "sequence length"),
    "long-only-window": (long_only_window, "length-dependent", "sequence length"),
    "log-length-scale": (log_length_scale, "length-dependent", "sequence length"),
    "position-scale": (position_scale, "unprovable", "goes through"),
    "post-mask": (probability_case(lambda p, d: p * (d < 3)), "post-softmax", "changed between softmax"),
    "far-post-mask": (probability_case(lambda p, d: p * (d < 4096)), "post-softmax", "changed between softmax"),
    "post-bias": (probability_case(lambda p, d: p + 0.01), "post-softmax", "changed between softmax"),
    "post-floor": (probability_case(lambda p, d: p.clamp(min=1e-7)), "post-softmax", "changed between softmax"),
    "post-ceiling": (probability_case(lambda p, d: p.clamp(max=0.95)), "post-softmax", "changed between softmax"),
    "post-crumb": (probability_case(lambda p, d: p + 1e-8), "post-softmax", "changed between softmax"),
    "post-scale": (probability_case(lambda p, d: p * 1.25), "post-softmax", "changed between softmax"),
    "post-square": (probability_case(lambda p, d: p**2), "unknown-scores", "pow"),
    "written-mask": (written_mask, "full", "changed in place|position bias|arbitrary"),
    "over-the-batch": (over_the_batch, "arbitrary", "not full"),
}


def _same_chunk(d: Tensor, size: int) -> Tensor:
    chunk = torch.arange(d.shape[0]) // size
    return chunk[:, None] == chunk[None, :]


def computed_window(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    window = torch.tensor(64) * 64
    return masked(q, k, v, (distance(q) >= 0) & (distance(q) < window))


PROVED: dict[str, tuple[Case, str, int | None]] = {
    "window-4096": (mask_case(lambda d: (d >= 0) & (d < 4096)), "sliding", 4096),
    "window-4096-sdpa": (sdpa_case(lambda d: (d >= 0) & (d < 4096)), "sliding", 4096),
    "window-100k": (mask_case(lambda d: (d >= 0) & (d <= 100_000)), "sliding", 100_001),
    "window-dense": (
        lambda q, k, v, i: masked(q, k, v, torch.ones_like(distance(q), dtype=torch.bool).tril().triu(-4999)),
        "sliding",
        5000,
    ),
    "window-additive": (
        sdpa_case(lambda d: torch.zeros(d.shape).masked_fill((d < 0) | (d > 6000), -INF)),
        "sliding",
        6001,
    ),
    "window-computed": (computed_window, "sliding", 4096),
    "window-beyond-reach": (mask_case(lambda d: (d >= 0) & (d < 1 << 40)), "causal", None),
    "doubly-causal": (mask_case(lambda d: (d >= 0) & (d > -3)), "causal", None),
    "post-bounds": (probability_case(lambda p, d: p.clamp(0, 1)), "causal", None),
    "post-mask-again": (probability_case(lambda p, d: p.masked_fill(d < 0, 0.0)), "causal", None),
    "row-constant": (score_case(lambda s, d: s + torch.arange(4)[:, None, None]), "causal", None),
    "soft": (score_case(lambda s, d: 20 * torch.tanh(s / 20)), "causal", None),
    # random scores come nowhere near the cap, as in Gemma 2 (scale 1/16, cap 50)
    "soft-far": (score_case(lambda s, d: 50 * torch.tanh(s / 16 / 50)), "causal", None),
    "soft-farther": (score_case(lambda s, d: 3e4 * torch.tanh(s / 100 / 3e4)), "causal", None),
    "statement": (
        lambda q, k, v, i: attend((s := raw(q, k)).masked_fill_(~causal(q), -INF) if True else s, v),
        "causal",
        None,
    ),
}


class Site(nn.Module):
    """One case as a module of its own, so that its path and source line can be asserted."""

    table: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.parameter = nn.Parameter(torch.zeros(HEADS))  # zero: a bias that can't be seen yet
        self.register_buffer("table", torch.randn(64, 64), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, position_ids: Tensor, memory: Tensor) -> Tensor:
        return self.case(q, k, v, Inputs(tokens, position_ids, memory, self.parameter, self.table))


class Pool(nn.Module):
    """Attention pooling: weights over time from a learned query, no q·k."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HEADS * DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(1).transpose(1, 2) @ x).expand_as(x)


class Router(nn.Module):
    """A mixture of experts with a softmax router, and a gate over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HEADS * DIM, 3)
        self.experts = nn.Parameter(torch.randn(3, HEADS * DIM, HEADS * DIM))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.einsum("btc,ecd->bted", x, self.experts)
        return torch.einsum("bte,bted->btd", self.gate(x).softmax(-1), outputs) + torch.matmul(
            self.gate(x).softmax(-1).unsqueeze(2), outputs
        ).squeeze(2)


class Many(nn.Module):
    """Every given case over the same q, k, v; returns one output per case."""

    def __init__(self, cases: dict[str, Case]) -> None:
        super().__init__()
        width = HEADS * DIM
        self.qkv = nn.Linear(width, 3 * width)
        self.sites = nn.ModuleDict({name.replace(".", "_"): Site(case) for name, case in cases.items()})
        self.pool, self.router = Pool(), Router()

    def forward(self, x: Tensor, tokens: Tensor, position_ids: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        heads = [part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        outputs = [site(*heads, tokens, position_ids, memory) for site in self.sites.values()]
        return (*outputs, self.pool(x), self.router(x))


def inputs(batch: int, length: int, memory: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, length, HEADS * DIM, generator=generator),
        "tokens": torch.randint(0, 5, (batch, length), generator=generator),
        "position_ids": torch.arange(length).expand(batch, length).clone(),
        "memory": torch.randn(batch, memory, HEADS * DIM, generator=generator),
    }


@pytest.fixture(scope="module")
def compiled() -> tuple[Many, Program]:
    """The module of all cases, and its program with every provable site rewritten."""
    torch.manual_seed(0)
    cases = {name: entry[0] for name, entry in [*REFUSED.items(), *PROVED.items()]}
    module = Many(cases).eval()
    program = capture(module, inputs(2, 12, 9))
    return module, Pipeline([Canonicalize(), ProveAttention()])(program)


@pytest.mark.parametrize("name", REFUSED)
def test_left_alone_with_a_reason(compiled: tuple[Many, Program], name: str) -> None:
    _, kind, reason = REFUSED[name]
    matching = [s for s in compiled[1].sites if s.path.partition("#")[0] == f"sites.{name}" and s.verdict == "refuse"]
    assert len(matching) == 1, [s for s in compiled[1].sites if f"sites.{name}" in s.path]
    site = matching[0]
    assert site.node is None and not site.proved
    assert (site.kind, bool(re.search(reason, site.reason))) == (kind, True), (site.kind, site.reason)
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (HEADS, HEADS, DIM, DIM)
    file, _, line = site.source.rpartition(":")
    assert file == __file__ and int(line) in range(1, 1000)


@pytest.mark.parametrize("name", PROVED)
def test_look_alikes_are_proved(compiled: tuple[Many, Program], name: str) -> None:
    _, kind, window = PROVED[name]
    site = compiled[1].site(f"sites.{name}")
    assert (site.verdict, site.kind, site.window) == ("rewrite", kind, window), site.reason
    assert site.max_error is not None and site.max_error <= 1e-5


def test_pooling_and_routers_are_no_candidates(compiled: tuple[Many, Program]) -> None:
    assert not [site.path for site in compiled[1].sites if not site.path.startswith("sites.")]


@pytest.mark.parametrize(("batch", "length", "memory"), [(1, 2, 3), (3, 9, 4), (1, 40, 7)])
def test_the_program_still_computes_the_module(
    compiled: tuple[Many, Program], batch: int, length: int, memory: int
) -> None:
    module, program = compiled
    skipped = {"random", "dropout", "sdpa-dropout", "top-k"}
    given = inputs(batch, length, memory, seed=length)
    with torch.no_grad():
        wanted, got = module(**given), program(**given)
    for name, a, b in zip([*module.sites, "pool", "router"], wanted, got, strict=True):
        if name not in skipped:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


def test_a_table_of_biases_is_refused() -> None:
    program = capture(Many({"table": table_bias}).eval(), inputs(2, 12, 9))  # alone: the table bounds the length
    (site,) = Pipeline([Canonicalize(), ProveAttention()])(program).sites
    assert program.max_positions == 64
    assert (site.verdict, site.kind) == ("refuse", "full")
    assert "position bias" in site.reason and "arbitrary" in site.reason


class Numbered(nn.Module):
    """Causal attention of four heads over two KV heads, under a mask made from the numbers in ``pad_mask``."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.q, self.kv = nn.Linear(HEADS * DIM, HEADS * DIM), nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor, pad_mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, DIM)).transpose(1, 2).repeat_interleave(2, 1) for y in self.kv(x).chunk(2, -1))
        return attend(self.change(raw(q, k).masked_fill(~causal(q), -1e4), pad_mask), v)


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (
            lambda s, pad: s.masked_fill(pad[:, None, :, None] != pad[:, None, None, :], -INF),
            "packed",
            "the numbers in 'pad_mask' separate packed sequences",
        ),
        # keys marked 2 are seen from everywhere; nothing about that is packing
        (
            lambda s, pad: s.where(pad[:, None, None, :] != 2, 0.0).masked_fill(pad[:, None, None, :] == 0, -INF),
            "unknown-mask",
            "numbers other than 0 and 1",
        ),
    ],
)
def test_what_numbers_in_a_mask_do_is_named(change: Callable[[Tensor, Tensor], Tensor], kind: str, reason: str) -> None:
    example = {"x": torch.randn(2, 12, HEADS * DIM), "pad_mask": torch.ones(2, 12, dtype=torch.long)}
    (site,) = Pipeline([Canonicalize(), ProveAttention()])(capture(Numbered(change).eval(), example)).sites
    assert (site.verdict, site.kind) == ("refuse", kind) and reason in site.reason
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (HEADS, 2, DIM, DIM)


def test_a_mask_for_0_and_1_alone_is_padding() -> None:
    """OpenAI GPT and BERT as they were: ``(1 − mask)·min`` on top of a causal mask that is a number, too."""
    lowest = torch.finfo(torch.float32).min
    module = Numbered(lambda s, pad: s + (1.0 - pad[:, None, None, :]) * lowest).eval()
    example = {"x": torch.randn(2, 12, HEADS * DIM), "pad_mask": torch.ones(2, 12, dtype=torch.long)}
    program = Pipeline([Canonicalize(), ProveAttention()])(capture(module, example))
    (site,) = program.sites
    assert (site.verdict, site.kind, site.padding) == ("rewrite", "causal", "pad_mask"), site.reason
    x, pad = torch.randn(3, 30, HEADS * DIM), torch.ones(3, 30, dtype=torch.long)
    pad[0, 25:], pad[1, 10:] = 0, 0
    real = pad.bool()[:, None, :, None]
    torch.testing.assert_close(program(x, pad).where(real, 0.0), module(x, pad).where(real, 0.0), rtol=1e-4, atol=1e-5)


class Layers(nn.Module):
    """Three sites of one structure, refused for one reason."""

    def __init__(self, scores: Callable[[Tensor], Tensor], probabilities: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(HEADS * DIM, 3 * HEADS * DIM) for _ in range(3))
        self.scores, self.probabilities = scores, probabilities

    def forward(self, x: Tensor) -> Tensor:
        for qkv in self.qkv:
            q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            scores = self.scores(q @ k.transpose(-1, -2)) * DIM**-0.5
            x = x + (self.probabilities(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        return x


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("scores", "probabilities", "node"),
    [
        (torch.relu, same, "relu"),
        (lambda x: (x * 2).sigmoid() + 1, same, "sigmoid"),
        (same, lambda x: x.square().to(x.dtype), "square"),
        (lambda x: x + torch.rand_like(x), same, "rand_like"),  # beside the chain: looked at one by one
    ],
)
def test_each_refusal_names_its_own_node(
    scores: Callable[[Tensor], Tensor], probabilities: Callable[[Tensor], Tensor], node: str
) -> None:
    """Chains of one structure are looked at once, and what was found used to be told of the first one's nodes."""
    program = capture(Layers(scores, probabilities).eval(), torch.randn(2, 6, HEADS * DIM))
    Pipeline([Canonicalize(), ProveAttention()])(program)
    names = [node, f"{node}_1", f"{node}_2"]
    assert {*names} <= {item.name for item in program.graph_module.graph.nodes}
    assert [site.verdict for site in program.sites] == ["refuse"] * 3
    assert [re.findall(r"'(\w+)'", site.reason) for site in program.sites] == [[name] for name in names]
    assert len({site.reason.replace(name, node) for site, name in zip(program.sites, names, strict=True)}) == 1
