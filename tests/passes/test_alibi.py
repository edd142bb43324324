"""ALiBi: exactly as one more feature in softmax, as a decay per head in GLA, and left alone where it is neither."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.passes.capture import capture
from lincompile.passes.distil.instrument import instead
from lincompile.passes.linearization.alibi import AlibiGLA, AlibiShape, decays, errors
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.stateful import make_stateful

HEADS, DIM = 4, 4
SLOPES = torch.tensor([0.5, 0.3, 0.125, 0.01])[:, None, None]
Bias = Callable[[Tensor, Tensor, int], Tensor]  # (query positions [T, 1], key positions [1, T], length) -> [H, T, T]

SPELLINGS: dict[str, Bias] = {
    "relative": lambda i, j, n: SLOPES * (j - i),
    "keys alone": lambda i, j, n: SLOPES * j[None],
    "absolute": lambda i, j, n: -(i - j).abs() * SLOPES,
    "from the end": lambda i, j, n: SLOPES * torch.arange(1 - n, 1)[None, None],
    "divided": lambda i, j, n: (j - i) / (1 / SLOPES),
    "masked": lambda i, j, n: (SLOPES * (j - i)).masked_fill(i < j, -math.inf),
}
REFUSED: dict[str, tuple[Bias, str]] = {
    "starts at 300": (lambda i, j, n: SLOPES * (j - i + 300).clamp(max=0), "toeplitz"),
    "kink at 3000": (lambda i, j, n: SLOPES * torch.where(i - j < 3000, j - i, 2 * (j - i)), "further away"),
    "step at 3000": (lambda i, j, n: SLOPES * (j - i) + torch.where(i - j < 3000, 0.0, 0.01), "further away"),
    "step at 40": (lambda i, j, n: SLOPES * (j - i) + torch.where(i - j < 40, 0.0, 0.002), "position bias"),
    "squared": (lambda i, j, n: -SLOPES * ((i - j) * (i - j)), "toeplitz"),
    "rounded": (lambda i, j, n: (SLOPES * (j - i)).bfloat16().float(), "which rounds them"),
    "by the length": (lambda i, j, n: SLOPES * (j - i) / n, "arbitrary"),
    "window from the end": (
        lambda i, j, n: SLOPES * (j - i) + torch.where(torch.arange(1 - n, 1) > -5000, 0.0, -1.0),
        "counts from a number that depends",
    ),
}


class Attention(nn.Module):
    """Causal attention over x ``[B, T, C]`` with a position bias."""

    def __init__(self, bias: Bias, kv_heads: int) -> None:
        super().__init__()
        self.bias, self.kv_heads = bias, kv_heads
        self.project = nn.Linear(HEADS * DIM, (HEADS + 2 * kv_heads) * DIM)

    def forward(self, x: Tensor) -> Tensor:
        sizes = (HEADS * DIM, self.kv_heads * DIM, self.kv_heads * DIM)
        q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in self.project(x).split(sizes, -1))
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, 1) for y in (k, v))
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None, :]
        scores = q @ k.transpose(-1, -2) * 0.5 + self.bias(i, j, x.shape[1])
        return (scores.masked_fill(i < j, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Many(nn.Module):
    def __init__(self, biases: list[Bias], kv_heads: int) -> None:
        super().__init__()
        self.sites = nn.ModuleList(Attention(bias, kv_heads) for bias in biases)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(site(x) for site in self.sites)


def proved(biases: list[Bias], kv_heads: int = HEADS, alibi: bool = True) -> tuple[nn.Module, Program]:
    module = Many(biases, kv_heads).eval()
    program = capture(module, torch.randn(2, 9, HEADS * DIM))
    return module, Pipeline(f"canonicalize,prove{{alibi={str(alibi).lower()}}}")(program)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_spelling_is_exact_in_softmax(kv_heads: int) -> None:
    module, program = proved(list(SPELLINGS.values()), kv_heads)
    for name, site in zip(SPELLINGS, program.sites, strict=True):
        assert site.verdict == "rewrite", f"{name}: {site.reason}"
        assert (site.kind, site.bias, site.head_dim, site.kv_heads) == ("causal", "alibi", DIM, kv_heads)
        torch.testing.assert_close(torch.tensor(site.slopes), SLOPES.flatten(), rtol=1e-5, atol=1e-7)
        assert "one more feature" in site.reason
    for batch, length in ((1, 1), (2, 33), (1, 300)):
        x = torch.randn(batch, length, HEADS * DIM, requires_grad=True)
        for a, b in zip(program(x), module(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)
            (ga,), (gb,) = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (a, b))
            torch.testing.assert_close(ga, gb, rtol=1e-3, atol=3e-4)


def test_it_is_refused_unless_asked_for() -> None:
    _, program = proved([SPELLINGS["relative"]], alibi=False)
    assert (program.sites[0].verdict, program.sites[0].bias) == ("refuse", "alibi")
    assert "--alibi" in program.sites[0].reason


def test_look_alikes_are_refused() -> None:
    _, program = proved([bias for bias, _ in REFUSED.values()])
    for (name, (_, reason)), site in zip(REFUSED.items(), program.sites, strict=True):
        assert site.verdict == "refuse" and reason in site.reason, f"{name}: {site.kind}: {site.reason}"


def test_slopes_become_decays_in_gla() -> None:
    shape = AlibiShape(4, 2, DIM, 5, 1, 0.5, True, slopes=(0.5, 0.125))
    method = AlibiGLA(shape).double()
    q, k, v = (torch.randn(1, heads, 11, width).double() for heads, width in ((4, DIM), (2, DIM), (2, 5)))
    out = method(q, k, v, v)
    for head in range(4):
        slope = shape.slopes[head // 2]
        distance = torch.arange(11)[:, None] - torch.arange(11)[None, :]
        weights = torch.exp(-slope * distance.double()).masked_fill(distance < 0, 0.0)
        wanted = (weights * (q[0, head] @ k[0, head // 2].T) * 0.5) @ v[0, head // 2] * (1 - math.exp(-slope))
        torch.testing.assert_close(out[0, head], wanted, rtol=1e-6, atol=1e-9)
    mask = torch.arange(11)[None] >= 4
    alone = method(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], v)
    torch.testing.assert_close(method(q, k, v, v, mask)[:, :, 4:], alone, rtol=1e-9, atol=1e-9)
    error = errors(method)
    assert error["decay"] < 1e-6 and 0 < error["output"] < 2


def test_the_rewritten_site_reports_its_error_and_trains() -> None:
    _, program = proved([SPELLINGS["relative"]])
    student = Pipeline([LinearizeAttention("gla")])(program)
    (site,) = student.sites
    assert site.method == "gla" and set(site.details["alibi_error"]) == {"decay", "output"}
    torch.testing.assert_close(
        student.graph_module.get_parameter("lincompile_attention.0.slope"), SLOPES.flatten(), rtol=1e-5, atol=1e-7
    )
    (out,) = student.graph_module(torch.randn(3, 17, HEADS * DIM))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.graph_module.parameters())


@pytest.mark.parametrize(
    ("options", "kv_heads", "slopes", "reason"),
    [
        ({"attn": "lawcat"}, 4, SLOPES, "decays in gla only, not in lawcat"),
        ({"attn": "gla", "window": 8}, 4, SLOPES, "--window isn't combined with ALiBi"),
        ({"attn": "gla"}, 2, SLOPES, "different ALiBi slopes"),
        ({"attn": "gla"}, 4, -SLOPES, "favours distant keys"),
    ],
)
def test_kept_exactly_in_softmax_with_the_reason(
    options: dict[str, Any], kv_heads: int, slopes: Tensor, reason: str
) -> None:
    module, program = proved([lambda i, j, n: slopes * (j - i)], kv_heads)
    student = Pipeline([LinearizeAttention(**options)])(program)
    assert student.sites[0].method == "softmax" and reason in student.sites[0].reason
    x = torch.randn(2, 21, HEADS * DIM)
    torch.testing.assert_close(student(x), module(x)[0], rtol=1e-4, atol=1e-5)


def test_slopes_that_fit_kv_heads() -> None:
    assert decays([0.5, 0.5, 0.25, 0.25], 2) == (0.5, 0.25)
    assert decays([0.5], 3) == (0.5, 0.5, 0.5)
    assert "don't fit" in decays([0.5, 0.25, 0.1], 2)


@pytest.mark.parametrize("attn", ["softmax", "gla"])
def test_step_form_counts_on(attn: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
        bias = (SLOPES * (j - i)).masked_fill(i < j, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    program = Pipeline("canonicalize,prove{alibi=true}")(capture(zoo.NanoGPT(attend).eval(), zoo.tokens()))
    step = make_stateful(Pipeline([LinearizeAttention(attn)])(program))
    assert step.max_error is not None and step.max_error < 1e-5


def test_the_training_graph_reads_what_the_student_reads() -> None:
    """Without the columns that stand for positions in the softmax op."""
    _, program = proved([SPELLINGS["relative"]])
    student = Pipeline([LinearizeAttention("gla")])(program.clone())
    seen: list[list[torch.Size]] = []

    def wrap(path: str, branch: nn.Module) -> nn.Module:
        branch.register_forward_pre_hook(lambda _, args: seen.append([x.shape for x in args]))
        return branch

    graph = instead(program, student, wrap)
    graph.graph_module(torch.randn(3, 17, HEADS * DIM))
    assert seen[0][0][-1] == seen[0][1][-1] == DIM
