"""``torch.compile(model, backend="lincompile")``: the same results, with canonical attention where it was proved."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.passes.program import AttentionSite


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(module: nn.Module, **options: Any) -> tuple[Any, list[AttentionSite], list[str]]:
    """The module compiled, the sites of its graphs, and the ops that the inner backend was handed."""
    sites: list[AttentionSite] = []
    ops: list[str] = []

    def inner(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    settings = {"backend": inner, "on_sites": sites.extend}
    return torch.compile(module, backend="lincompile", options=settings, **options), sites, ops


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("nanogpt", True), ("nanogpt-masked-fill", False), ("nanogpt-gqa-5d", True), ("llama", False), ("llama", True)],
)
def test_same_results_with_canonical_attention(name: str, dynamic: bool) -> None:
    if name in zoo.HUGGINGFACE:
        pytest.importorskip("transformers")
    module, example = zoo.build(name)
    run, sites, ops = compiled(module, dynamic=dynamic)
    torch.testing.assert_close(run(**example), module(**example), rtol=0, atol=2e-5)
    assert [site.verdict for site in sites] == ["rewrite", "rewrite"], [site.reason for site in sites]
    assert ops.count("lincompile.softmax_attention.default") == 2
    assert not any("softmax.int" in op or "scaled_dot" in op for op in ops)
    if dynamic and name == "nanogpt":
        tokens = zoo.tokens(3, 17)
        torch.testing.assert_close(run(tokens), module(tokens), rtol=0, atol=2e-5)
        assert len(sites) == 2, "another length was compiled anew"


def test_gradients_reach_the_models_own_parameters() -> None:
    module, example = zoo.build("nanogpt-masked-fill")
    wanted = torch.autograd.grad(module(**example).square().mean(), list(module.parameters()))
    run = torch.compile(module, backend="lincompile", options={"backend": "aot_eager"})
    found = torch.autograd.grad(run(**example).square().mean(), list(module.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Table(nn.Module):
    """Attention masked by a table in a buffer, q = k = v = x."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)


def test_a_mask_table_that_changes_later_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    module, x = Table(), torch.randn(2, 3, 8, 4)
    run, sites, _ = compiled(module)
    torch.testing.assert_close(run(x), module(x), rtol=0, atol=1e-6)
    assert sites[0].verdict == "rewrite"
    module.mask[3, 0] = False
    with caplog.at_level(logging.WARNING, "lincompile"):
        torch.testing.assert_close(run(x), module(x), rtol=0, atol=1e-6)
    assert "has changed" in caplog.text


def test_refused_sites_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    def anticausal(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(8, 8, dtype=torch.bool).triu())

    x = torch.randn(2, 3, 8, 4)
    with caplog.at_level(logging.WARNING, "lincompile"):
        run = torch.compile(anticausal, backend="lincompile", options={"backend": "eager"})
        torch.testing.assert_close(run(x), anticausal(x), rtol=0, atol=1e-6)
    assert "refuse: the mask is anticausal" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"attn": "gla"}}, "no option 'attn'.*linearize_"),
        ({"options": {"inner": "eager"}}, "no option 'inner'; its options are backend, on_sites"),
        ({"mode": "max-autotune"}, "takes no mode"),
    ],
)
def test_bad_options(arguments: dict[str, Any], message: str) -> None:
    run = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="lincompile", **arguments)
    with pytest.raises(Exception, match=message):
        run(torch.randn(2, 3, 8, 4))
