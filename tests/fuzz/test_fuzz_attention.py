"""Random attention modules: each site is either rewritten to exactly what it computed, or left alone.

One example is a module of ``SITES`` random attentions (one export serves them all). The CI profile tries 100 of them,
always the same; ``HYPOTHESIS_PROFILE=nightly pytest tests/fuzz`` tries 2,000 new ones, and the summary counts their
verdicts. A site that was rewritten is held against its specification in two ways: the program against the module,
outputs and gradients, at lengths never seen in capture; and the mask's own formula against the kind and window the
site reports, at positions far past any length that runs here.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline

SITES, HEADS, DIM = 10, 4, 4
CONSTANTS = (0, 1, 2, 3, 5, 12, 40, 300, 900, 4096, 5000, 100_000)
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
MODULES = 2000 if NIGHTLY else 100

Mask = Callable[[Tensor, Tensor, int], Tensor]  # (query positions [n, 1], key positions [1, m], length) -> bool


@dataclass(frozen=True)
class Leaf:
    """One comparison of positions; ``text`` names it in a failing example."""

    text: str
    constant: int

    def __call__(self, i: Tensor, j: Tensor, length: int) -> Tensor:
        c = self.constant
        table: dict[str, Callable[[], Tensor]] = {
            "i>=j": lambda: i >= j,
            "i>=j+c": lambda: i >= j + c,
            "i-j<c": lambda: i - j < c,
            "j-i<c": lambda: j - i < c,
            "abs<c": lambda: (i - j).abs() < c,
            "j<c": lambda: (j < c) | (i < 0),
            "i<c": lambda: (i < c) | (j < 0),
            "i!=c": lambda: (i != c) | (j < 0),
            "i-j!=c": lambda: i - j != c,
            "i+j<c": lambda: i + j < c,
            "2i-j<c": lambda: 2 * i - j < c,
            "chunk": lambda: i // max(c, 1) == j // max(c, 1),
            "stride": lambda: (i - j) % max(c, 1) == 0,
            "scaled": lambda: (i - j) * 0.01 < c * 0.01,
            "short": lambda: (i - j < 7) | (i * 0 + j * 0 + length < c),
            "tail": lambda: (j >= length - c) | (i < 0),
            "hole": lambda: (torch.arange(64) != 5)[((i - j).clamp(min=0) // max(c, 1)).clamp(max=63)],
            "small": lambda: (i - j).to(torch.int16) < min(c, 32_000),
        }
        return table[self.text]()


@dataclass(frozen=True)
class Combine:
    """``left and right``, ``left or right`` or ``not left``."""

    op: str
    left: Leaf | Combine
    right: Leaf | Combine

    def __call__(self, i: Tensor, j: Tensor, length: int) -> Tensor:
        left = self.left(i, j, length)
        if self.op == "not":
            return ~left
        return left & self.right(i, j, length) if self.op == "and" else left | self.right(i, j, length)


@dataclass(frozen=True)
class Spec:
    """One random attention."""

    layout: str
    kv_heads: int
    expand: str
    mask: Leaf | Combine | None
    form: str
    scale: float
    scale_on: str
    bias: str
    softmax: str
    after: str
    pad: str = "none"

    @property
    def plain(self) -> bool:
        """Whether it is canonical softmax attention in an ordinary spelling, which must be found."""
        canonical = self.mask is None or self.mask == Leaf("i>=j", 0)
        ordinary = self.form in ("fill", "where", "additive", "written") and self.bias == "none"
        other_rank = self.layout in ("sdpa", "bmm") or (self.layout == "grouped" and self.kv_heads < HEADS)
        constant = self.scale_on in ("scores", "divide", "q", "tensor") or other_rank
        as_they_are = (self.after in ("none", "nan") and self.softmax != "half") or self.layout == "sdpa"
        return canonical and ordinary and constant and as_they_are and self.scale > 0 and self.pad in ("none", "keys")

    @property
    def overflows(self) -> bool:
        """Whether the module's own exponentials overflow: ALiBi of far keys after the query, no maximum subtracted."""
        first = self.mask.left if isinstance(self.mask, Combine) and self.mask.op == "and" else self.mask
        return self.softmax == "no-maximum" and self.bias.startswith("alibi") and first != Leaf("i>=j", 0)


TEXTS = [
    *["i>=j"] * 4,
    *[
        "i>=j+c",
        "i-j<c",
        "j-i<c",
        "abs<c",
        "j<c",
        "i<c",
        "i!=c",
        "i-j!=c",
        "i+j<c",
        "2i-j<c",
        "chunk",
        "stride",
        "scaled",
        "short",
        "tail",
        "hole",
        "small",
    ],
]
leaves = st.builds(Leaf, st.sampled_from(TEXTS), st.sampled_from(CONSTANTS)).map(
    lambda leaf: Leaf(leaf.text, 0) if leaf.text == "i>=j" else leaf
)
causal_and = st.builds(Combine, st.just("and"), st.just(Leaf("i>=j", 0)), leaves)
masks = st.one_of(
    st.none(),
    st.just(Leaf("i>=j", 0)),
    leaves,
    causal_and,
    causal_and,
    st.recursive(
        leaves, lambda inner: st.builds(Combine, st.sampled_from(["and", "or", "not"]), inner, inner), max_leaves=4
    ),
)
specs = st.builds(
    Spec,
    layout=st.sampled_from(
        ["matmul", "einsum", "einsum-bthd", "bmm", "grouped", "sdpa", "keys-first", "values-first", "dots", "turned"]
    ),
    kv_heads=st.sampled_from([4, 4, 2, 1]),
    expand=st.sampled_from(["interleave", "expand", "tile"]),
    mask=masks,
    form=st.sampled_from(["fill", "where", "additive", "additive", "multiply", "small-fill", "written", "row-written"]),
    scale=st.sampled_from([0.5, 0.5, DIM**-0.5, 1.0, -0.5]),
    scale_on=st.sampled_from([*["scores", "divide", "q", "tensor"] * 2, "head", "learned", "length", "batch"]),
    bias=st.sampled_from(
        [
            *["none"] * 8,
            "alibi",
            "alibi-heads",
            "relu-far",
            "root",
            "head",
            "heads",
            "rows",
            "softcap",
            "clamp",
            "query",
        ]
    ),
    softmax=st.sampled_from(["plain", "float32", "manual", "log", "half", "no-maximum"]),
    after=st.sampled_from([*["none"] * 8, "mask", "far-mask", "add", "nan", "sink", "talk", "flip", "twice"]),
    pad=st.sampled_from([*["none"] * 5, "keys", "keys", "after", "queries", "both"]),
).map(lambda spec: replace(spec, softmax="manual") if spec.overflows else spec)


def softmax(kind: str, scores: Tensor) -> Tensor:
    if kind == "float32":
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    if kind == "half":
        return F.softmax(scores, dim=-1, dtype=torch.bfloat16).to(scores.dtype)
    if kind == "no-maximum":
        return torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
    if kind == "manual":
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return weights / weights.sum(-1, keepdim=True)
    return F.log_softmax(scores, -1).exp() if kind == "log" else scores.softmax(-1)


class Attention(nn.Module):
    """What a ``Spec`` says; q, k, v ``[B, H or kv, T, D]`` come from one projection of x."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.project = nn.Linear(HEADS * DIM, (HEADS + 2 * spec.kv_heads) * DIM)
        self.learned = nn.Parameter(torch.ones(()))
        self.register_buffer("by_head", torch.tensor([0.5, 1.0, 1.0, 2.0])[:, None, None], persistent=False)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        spec = self.spec
        sizes = (HEADS * DIM, spec.kv_heads * DIM, spec.kv_heads * DIM)
        parts = [y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in self.project(x).split(sizes, -1)]
        q, k, v = parts
        length, grouped = x.shape[1], spec.layout == "grouped" and spec.kv_heads < HEADS
        if not grouped:
            k, v = (self.repeat(y) for y in (k, v))
        scale = spec.scale
        if spec.scale_on == "q":
            q = q * scale
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        allowed = None if spec.mask is None else spec.mask(i, j, length)
        rank = 3 if spec.layout == "bmm" else 5 if grouped else 4
        real = pad.bool()
        if rank == 3:
            real = real[:, None].expand(-1, HEADS, -1).reshape(-1, length)
        if spec.pad in ("keys", "both"):
            keys = real.view(-1, *([1] * (rank - 2)), length)
            allowed = keys if allowed is None else allowed & keys
        if spec.layout == "sdpa":
            mask = None if allowed is None else allowed if spec.form != "additive" else self.additive(allowed)
            return (
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=1.0 if spec.scale_on == "q" else abs(scale)
                )
                .transpose(1, 2)
                .flatten(2)
            )
        scores = self.contract(q, k, grouped)
        if rank == 4 and spec.scale_on in ("head", "learned", "length", "batch"):
            more = {
                "head": self.by_head,
                "learned": self.learned,
                "length": 1 + length / 1e5,
                "batch": x.shape[0] * 0.5,
            }
            scores = scores * more[spec.scale_on]
        if spec.scale_on != "q":
            factor = torch.tensor(scale) if spec.scale_on == "tensor" else scale
            scores = scores / (1 / factor) if spec.scale_on == "divide" else scores * factor
        scores = self.biased(scores, i, j, rank)
        if allowed is not None:
            scores = self.masked(scores, allowed)
        if spec.after == "sink":
            sink = torch.zeros_like(scores[..., :1])
            return self.average(softmax(spec.softmax, torch.cat([scores, sink], -1))[..., :-1], v, grouped)
        weights = softmax(spec.softmax, scores)
        if spec.pad in ("after", "both"):
            weights = weights * real.view(-1, *([1] * (rank - 2)), length)
        if spec.pad == "queries":
            weights = weights * real.view(-1, *([1] * (rank - 3)), length, 1)
        if spec.after == "nan":
            weights = weights.nan_to_num(0.0)
        elif spec.after == "talk" and rank == 4:
            weights = torch.einsum("bhqk,hg->bgqk", weights, torch.eye(HEADS) + 0.1)
        elif spec.after == "flip":
            weights = weights.flip(-1)
        elif spec.after == "twice":
            return self.average(weights, v, grouped) + weights.amax().detach() * 0.1
        elif spec.after == "mask" and allowed is not None:
            weights = weights.masked_fill(~allowed, 0.0)
        elif spec.after == "far-mask":
            weights = weights * (i - j < 300)
        elif spec.after == "add":
            weights = weights + 0.01
        return self.average(weights, v, grouped)

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, dim = x.shape
        if heads == HEADS:
            return x
        if self.spec.expand == "interleave":
            return x.repeat_interleave(HEADS // heads, 1)
        if self.spec.expand == "tile":  # the wrong head order: another model, whose heads read other KV heads
            return x.repeat(1, HEADS // heads, 1, 1)
        return x[:, :, None].expand(batch, heads, HEADS // heads, length, dim).reshape(batch, HEADS, length, dim)

    def contract(self, q: Tensor, k: Tensor, grouped: bool) -> Tensor:
        layout = self.spec.layout
        if grouped:
            return torch.einsum("bkgqd,bksd->bkgqs", q.unflatten(1, (k.shape[1], -1)), k)
        if layout == "keys-first":
            return (k @ q.transpose(-2, -1)).transpose(-2, -1)
        if layout == "dots":
            return torch.einsum("...kd,...qd->...qk", k, q)
        if layout == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k)
        if layout == "einsum-bthd":
            return torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
        if layout == "bmm":
            return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        return q @ k.transpose(-2, -1)

    def average(self, weights: Tensor, v: Tensor, grouped: bool) -> Tensor:
        layout = self.spec.layout
        if grouped:
            return torch.einsum("bkgqs,bksd->bqkgd", weights, v).flatten(2)
        if layout == "einsum":
            return torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2)
        if layout == "dots":
            return torch.einsum("...kd,...qk->...qd", v, weights).transpose(1, 2).flatten(2)
        if layout == "values-first":
            return torch.matmul(v.transpose(-2, -1), weights.transpose(-2, -1)).permute(0, 3, 1, 2).flatten(2)
        if layout == "turned":
            return torch.einsum("bhqk,bhkd->bhdq", weights, v).permute(0, 3, 1, 2).flatten(2)
        if layout == "einsum-bthd":
            return torch.einsum("bhqk,bkhd->bqhd", weights, v.transpose(1, 2)).flatten(2)
        out = torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (-1, HEADS)) if layout == "bmm" else weights @ v
        return out.transpose(1, 2).flatten(2)

    def additive(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))

    def masked(self, scores: Tensor, allowed: Tensor) -> Tensor:
        form = self.spec.form
        if form == "additive":
            return scores + self.additive(allowed)
        if form in ("written", "row-written"):
            mask = torch.zeros(allowed.shape)
            mask.masked_fill_(~allowed, float("-inf"))
            if form == "row-written":
                mask.transpose(-1, -2)[..., :1, :].fill_(-1.0)
            return scores + mask
        if form == "where":
            return torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        if form == "multiply":
            return scores * allowed
        return scores.masked_fill(~allowed, -5.0 if form == "small-fill" else float("-inf"))

    def biased(self, scores: Tensor, i: Tensor, j: Tensor, rank: int) -> Tensor:
        bias = self.spec.bias
        if rank == 4 and bias == "alibi-heads":
            return scores - self.by_head * (i - j)
        if rank == 4 and bias == "heads":
            return scores + self.by_head
        if rank == 4 and bias == "rows":
            return scores + 0.1 * torch.arange(scores.shape[0])[:, None, None, None] * (i - j < 4)
        if bias == "root":
            return scores - (i - j).abs().float().sqrt()
        if bias == "alibi":
            return scores - 0.3 * (i - j)
        if bias == "relu-far":
            return scores - (i - j - 300).clamp(min=0)
        if bias == "head":
            return scores + 0.7
        if bias == "query":
            return scores + (i % 3)
        if bias == "clamp":
            return scores.clamp(-40, 40)
        return 5.0 * torch.tanh(scores / 5.0) if bias == "softcap" else scores


class Decoys(nn.Module):
    """A router, a pooling softmax and a gate: softmaxes that are no attention."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.route, self.pool, self.expert = nn.Linear(width, 3), nn.Linear(width, 1), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        experts = self.expert(x).unflatten(-1, (3, -1))
        mixed = (self.route(x).softmax(-1).unsqueeze(-2) @ experts).squeeze(-2)
        return mixed + x.softmax(-1) * (self.pool(x).softmax(1).transpose(1, 2) @ x)


class Many(nn.Module):
    """Several attentions side by side, and the decoys."""

    def __init__(self, chosen: list[Spec]) -> None:
        super().__init__()
        self.sites = nn.ModuleList(Attention(spec) for spec in chosen)
        self.decoys = Decoys()

    def forward(self, x: Tensor, pad_mask: Tensor) -> tuple[Tensor, ...]:
        return (*(site(x, pad_mask) for site in self.sites), self.decoys(x))


def canonical(kind: str, window: int | None, i: Tensor, j: Tensor) -> Tensor:
    if kind == "full":
        return (i >= 0) & (j >= 0)
    return (i >= j) & (i - j < window) if kind == "sliding" and window is not None else i >= j


def check(chosen: list[Spec], seed: int = 0) -> list[str]:
    """Proves the sites of ``chosen`` and asserts that nothing was rewritten wrongly; returns their verdicts."""
    torch.manual_seed(seed)
    module = Many(chosen).eval()
    example = {"x": torch.randn(2, 9, HEADS * DIM), "pad_mask": torch.ones(2, 9, dtype=torch.long)}
    captured = capture(module, example)
    program = Pipeline([Canonicalize(), ProveAttention(alibi=True)])(captured)
    assert all(site.path.startswith("sites.") for site in program.sites), "a decoy became a candidate"
    sites = {int(site.path.split(".")[1]): site for site in program.sites}
    for batch, length in ((1, 1), (3, 5), (2, 48), (1, 350)):
        x = torch.randn(batch, length, HEADS * DIM, requires_grad=True)
        pad = torch.ones(batch, length, dtype=torch.long)
        if batch > 1:
            pad[0, : length // 3], pad[-1, -2:] = 0, 0
        for index, (a, b) in enumerate(zip(module(x, pad), program(x, pad), strict=True)):
            spec = chosen[index] if index < len(chosen) else None
            if spec is not None and spec.pad != "none":  # queries of padding are nobody's result
                a, b = (y.masked_fill(~pad.bool()[..., None], 0.0) for y in (a, b))
            known = a.isfinite() & b.isfinite()  # a row that sees no key is NaN in some spellings, 0 in others
            torch.testing.assert_close(b[known], a[known], rtol=1e-4, atol=3e-5, msg=f"{spec} at {batch}, {length}")
            if spec is not None and index in sites and sites[index].proved:
                assert bool(known.all()), (spec, length)
            if bool(known.all()):
                (ga,), (gb,) = (torch.autograd.grad((y * y.detach().cos()).sum(), x, retain_graph=True) for y in (a, b))
                ga, gb = (y.where(ga.isfinite(), 0.0) for y in (ga, gb))  # padded queries may see nothing at all
                torch.testing.assert_close(
                    gb, ga, rtol=1e-3, atol=2e-4, equal_nan=True, msg=f"gradient of {spec} at {batch}, {length}"
                )
    near = {c + step for c in CONSTANTS for step in (-2, -1, 0, 1, 2)} | {2 * c + 1 for c in CONSTANTS}
    far = torch.tensor(sorted(p for p in near | {7, 511, 2048, 70_000, 250_000} if p >= 0))
    verdicts = []
    for index, spec in enumerate(chosen):
        site = sites.get(index)
        assert site is not None, f"neither proved nor refused: {spec}"
        verdicts.append(site.verdict)
        if not site.proved:
            assert not spec.plain, f"not proved: {spec}: {site.reason}"
            continue
        i, j = far[:, None], far[None, :]
        for length in (250_001, 400_000):
            allowed = torch.ones(len(far), len(far), dtype=torch.bool) if spec.mask is None else spec.mask(i, j, length)
            assert torch.equal(allowed.expand(len(far), len(far)), canonical(site.kind, site.window, i, j)), (
                spec,
                site,
            )
        assert bool(site.padding) == (spec.pad in ("keys", "both")), (spec, site)
        assert site.scale is not None and math.isclose(
            site.scale, 1.0 if spec.scale_on == "q" else abs(spec.scale), rel_tol=1e-4
        )
    return verdicts


@pytest.mark.timeout(0 if NIGHTLY else 300)
def test_random_attention_is_rewritten_exactly_or_not_at_all(fuzz_verdicts: Counter[str]) -> None:
    @settings(
        max_examples=MODULES // SITES,
        deadline=None,
        derandomize=not NIGHTLY,
        database=None,
        phases=(Phase.generate,),  # what fails names its site; shrinking ten of them takes minutes and says no more
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(st.lists(specs, min_size=SITES, max_size=SITES))
    def try_them(chosen: list[Spec]) -> None:
        fuzz_verdicts.update(check(chosen))

    try_them()
    assert fuzz_verdicts.total() >= MODULES


PLAIN = Spec("einsum", 4, "expand", None, "where", 0.5, "scores", "none", "plain", "none")
FOUND = {
    # findings were shared by sites with one score chain, whatever came between their softmax and v
    "sites with one score chain and different probabilities": [
        PLAIN,
        replace(PLAIN, after="far-mask"),
        replace(PLAIN, after="add"),
        PLAIN,
    ],
    "a plain site after one with other probabilities": [replace(PLAIN, after="add"), PLAIN],
    # one slope was counted for every batch row's heads
    "ALiBi over batch and heads in one axis": [
        PLAIN,
        Spec("bmm", 2, "expand", None, "fill", 0.5, "tensor", "alibi", "log", "none"),
    ],
    # crashed: four slopes were seen at one length, eight of two batch rows at another
    "ALiBi over batch and heads in one axis, with a hole": [
        PLAIN,
        Spec("bmm", 1, "tile", Leaf("i-j!=c", 300), "additive", 0.5, "scores", "alibi", "plain", "nan", "queries"),
    ],
    "heads mixed after the softmax weren't reported": [replace(PLAIN, after="talk"), PLAIN],
    "the exponential written twice": [replace(PLAIN, softmax="no-maximum"), PLAIN],
}


@pytest.mark.parametrize("name", FOUND)
def test_found_before(name: str) -> None:
    verdicts = check(FOUND[name])
    assert verdicts == ["rewrite" if spec.plain else "refuse" for spec in FOUND[name]]
