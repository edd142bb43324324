"""Canonicalization keeps values and gradients, and leaves one spelling where tracing left many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program


class Calls(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


def no_grad_region(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sum(-1, keepdim=True).sigmoid()
    return x * scale


def in_place_chain(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1.0)
    y.mul_(x)
    return y + x


def view_write(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :, :3].mul_(5.0)  # seen by y through shared memory
    return y + x


def write_after_view(x: Tensor) -> Tensor:
    y = x * 2
    z = y.transpose(1, 2)
    y.add_(1.0)
    return z * 3


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "no-grad": no_grad_region,
    "in-place": in_place_chain,
    "view-write": view_write,
    "write-after-view": write_after_view,
    "no-ops": lambda x: F.dropout(x.clone()[:, :] * 1, 0.5, training=False).to(x.dtype).contiguous() + 0,
    "exp-sum": lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
    "shifted": lambda x: (e := torch.exp(x - x.amax(-1, keepdim=True))) / e.sum(-1, keepdim=True),
    "log-softmax": lambda x: F.log_softmax(x, -1).exp(),
    "respelled": lambda x: torch.concat([torch.moveaxis(torch.swapaxes(torch.multiply(x, 2), 1, -1), 1, 2), x], -1),
    "other-axis": lambda x: (e := torch.exp(x)) / e.sum(1, keepdim=True),
    "not-a-softmax": lambda x: (e := torch.exp(x)) / (e.sum(-1, keepdim=True) + 1),
}


def canonical(function: Callable[[Tensor], Any]) -> tuple[nn.Module, Program]:
    module = Calls(function).eval()
    return module, Pipeline([Canonicalize()])(capture(module, torch.randn(2, 5, 8)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_stay(name: str) -> None:
    module, program = canonical(FUNCTIONS[name])
    for shape in ((1, 1, 8), (3, 11, 8)):
        x = torch.randn(shape)
        a, b = module(x), program(x)
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
        parameters = list(module.parameters())
        wanted, got = (torch.autograd.grad(y.cos().sum(), parameters) for y in (a, b))
        for one, other in zip(wanted, got, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    counts = program.op_counts()
    folded = name in ("exp-sum", "shifted", "log-softmax")
    assert bool(counts.get("aten.softmax.int")) == folded
    if name == "no-ops":
        assert set(counts) == {"aten.linear.default"}
    if name == "respelled":
        assert set(counts) == {
            f"aten.{op}" for op in ("linear.default", "mul.Tensor", "transpose.int", "permute.default", "cat.default")
        }
    if name == "in-place":
        assert not any("_." in op for op in counts)
    before = str(program.graph_module.graph)
    again = Pipeline([Canonicalize()])(program)
    assert str(again.graph_module.graph) == before and not again.history[-1]["modified"]


def test_flex_attention_is_written_out_with_its_gradients() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    slopes = torch.tensor([0.5, 0.25])

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where((query >= key) & (query - key < 4000), score, -float("inf"))

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key)

    class Flex(nn.Module):
        def forward(self, q: Tensor) -> tuple[Any, Any]:
            return flex_attention(q, q, q, score_mod=biased), flex_attention(q, q, q[..., :3], score_mod=alibi)

    q = torch.randn(2, 2, 9, 4)
    module = Flex().eval()
    program = capture(module, {"q": q}, dynamic_shapes={"q": {0: "batch", 2: "sequence"}})
    program = Pipeline([Canonicalize(), ProveAttention()])(program)
    assert [(s.kind, s.window, s.bias) for s in program.sites] == [("sliding", 4000, "none"), ("full", None, "alibi")]
    assert program.sites[1].slopes == pytest.approx((0.5, 0.25), rel=1e-4)
    x = torch.randn(1, 2, 30, 4)
    for a, b in zip(module(x), program(x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    torch.autograd.grad(sum(y.sum() for y in program(x)), x)


class Respelled(nn.Module):
    """Causal attention in the second names of its ops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(20, 16), nn.Linear(16, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, length, _ = x.shape
        q, k, v = (torch.movedim(part.view(batch, length, 2, 8), 2, 1) for part in self.qkv(x).chunk(3, -1))
        scores = torch.divide(torch.multiply(q, 1.0) @ k.mT, 8**0.5)
        places = torch.arange(length)
        hidden = torch.less(places[:, None], places[None, :])
        p = torch.special.softmax(scores.masked_fill(hidden, -float("inf")), -1)
        return torch.subtract(torch.moveaxis(p @ v, (1,), (2,)).flatten(2), torch.negative(x))


def test_attention_in_second_names_is_proved() -> None:
    module = Respelled().eval()
    program = Pipeline([Canonicalize(), ProveAttention()])(capture(module, torch.randint(0, 20, (2, 9))))
    (site,) = program.sites
    assert site.proved and site.kind == "causal", site.reason
    assert program.history[0]["report"]["ops respelled"] == 11
    for length in (1, 33):
        tokens = torch.randint(0, 20, (3, length))
        torch.testing.assert_close(program(tokens), module(tokens), rtol=1e-5, atol=1e-5)
