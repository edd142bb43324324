"""The cross-entropy of attention weights: value and gradients against all weights at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distil_models import linear, proved, windows
from torch import Tensor

from lincompile.passes.distil.transfer import Errors, Transfer, transfer
from lincompile.passes.distil.weights import weights_loss
from lincompile.passes.errors import LincompileError
from lincompile.passes.linearization.methods import LinearMethod, SiteShape, method_class

BATCH, LENGTH, HEADS, KV, DIM, HIDDEN = 2, 11, 4, 2, 4, 6


def site(name: str, causal: bool, window: int = 0) -> tuple[LinearMethod, list[Tensor], list[Tensor]]:
    """A float64 method, the softmax's q and k (three times as large), and the method's operands."""
    torch.manual_seed(1)
    branch = method_class(name)(SiteShape(HEADS, KV, DIM, DIM, HIDDEN, 0.5, causal, window)).double()
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    q, k, v = (torch.randn(BATCH, heads, LENGTH, DIM, dtype=torch.float64) for heads in (HEADS, KV, KV))
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    return branch, [3 * q, 3 * k], [q, k, v, x, *([3 * q, 3 * k] if window else [])]


def dense(branch: LinearMethod, softmax: tuple[Any, ...], scores: list[Tensor], operands: list[Tensor]) -> Tensor:
    """All weights at once, from features and gates by hand."""
    kind, window, scale, _ = softmax
    q, k, _, x = operands[:4]
    groups = HEADS // KV
    offset = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool) if kind == "full" else offset >= 0
    seen = visible if kind != "sliding" else visible & (offset < window)
    sums = scores[0] @ scores[1].repeat_interleave(groups, 1).mT * scale
    wanted = sums.masked_fill(~seen, float("-inf")).softmax(-1)
    module: Any = branch
    if branch.method == "hedgehog":
        features_q, features_k = module.map_q(q), module.map_k(k)
        decay = torch.zeros(BATCH, KV, LENGTH, 2 * DIM, dtype=torch.float64)
    else:
        features_q = module.map.grouped(module.conv_q(q, None), groups)
        features_k, decay = module.map(module.conv_k(k, None)), module.gate(x, None)
    sums_of_decay = decay.cumsum(2).repeat_interleave(groups, 1)
    between = (sums_of_decay[:, :, :, None] - sums_of_decay[:, :, None]).clamp(max=0)
    keys = features_k.repeat_interleave(groups, 1)
    weights = torch.einsum("bhic,bhjc,bhijc->bhij", features_q, keys, between.exp()).masked_fill(~visible, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    return -(wanted * (weights + 1e-8).log()).sum(-1).mean()


@pytest.mark.parametrize(
    ("name", "softmax", "beside"),
    [
        ("hedgehog", ("causal", 0, 0.5, 0.0), 0),
        ("hedgehog", ("full", 0, 0.5, 0.0), 0),
        ("hedgehog", ("sliding", 5, 0.5, 0.0), 0),
        ("lawcat", ("causal", 0, 0.5, 0.0), 0),
        ("lawcat", ("causal", 0, 0.5, 0.0), 3),
    ],
)
def test_values_and_gradients_are_those_of_all_weights_at_once(
    name: str, softmax: tuple[Any, ...], beside: int
) -> None:
    branch, scores, operands = site(name, softmax[0] != "full", beside)
    learning = {n: p for n, p in branch.named_parameters() if not n.startswith("mix")}
    got = weights_loss(branch, softmax, *scores, *operands)
    found = torch.autograd.grad(got, list(learning.values()))
    wanted = dense(branch, softmax, scores, operands)
    expected = torch.autograd.grad(wanted, list(learning.values()))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    for parameter, a, b in zip(learning, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=f"gradient of {parameter}")


@pytest.mark.parametrize("attn", ["hedgehog", "lawcat"])
@pytest.mark.parametrize("loss", ["weights", "both"])
def test_training_on_weights_lowers_their_cross_entropy(attn: str, loss: str) -> None:
    teacher = proved()
    student = linear(teacher, attn)
    entropies: list[list[float]] = [[], []]

    def measure(into: list[float]) -> None:
        errors = Errors(teacher, student, "weights")
        for comparison in errors.comparisons:
            inside: Any = comparison.site
            comparison.register_forward_pre_hook(
                lambda _, given, inside=inside: into.append(
                    float(weights_loss(inside.branch, inside.softmax, *given[1:]).detach())
                )
            )
        errors(windows().measure(2))

    measure(entropies[0])
    report = transfer(teacher, student, windows(), Transfer(steps=25, rate=3e-2, loss=loss))
    measure(entropies[1])
    assert all(after < before for before, after in zip(*entropies, strict=True)), entropies
    assert sum(entropies[1]) < sum(entropies[0]) - 0.05
    assert sum(report.after.values()) < sum(report.before.values())


@pytest.mark.parametrize("attn", ["gla", "gated-delta"])
def test_methods_without_weights_are_refused(attn: str) -> None:
    teacher = proved()
    with pytest.raises(LincompileError, match=rf"{attn} at 'h\.0\.attn' sums where softmax averages.*hedgehog and law"):
        transfer(teacher, linear(teacher, attn), windows(), Transfer(steps=1, loss="weights"))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(LincompileError, match="--transfer-loss l1: the choice is mse, weights, both"):
        Transfer(loss="l1")
