"""gated_delta: recurrent == chunkwise == step in float64, values, states and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lincompile.kernels import ops
from lincompile.kernels.gated_delta import reference


def make(
    decay: str, *, heads: int = 6, kv_heads: int = 2, length: int = 70, head_dim: int = 8, value_dim: int = 5
) -> list[Tensor | None]:
    torch.manual_seed(3)
    k = torch.nn.functional.normalize(torch.randn(2, kv_heads, length, head_dim, dtype=torch.float64), dim=-1)
    g = None
    if decay != "none":
        g = -0.1 * torch.rand(2, kv_heads, length, 1, dtype=torch.float64)
        if decay == "strong":
            g = g * 100
        if decay == "-inf":
            g[:, :, ::3] = float("-inf")
    return [
        torch.randn(2, heads, length, head_dim, dtype=torch.float64),
        k,
        torch.randn(2, kv_heads, length, value_dim, dtype=torch.float64),
        torch.rand(2, kv_heads, length, dtype=torch.float64),
        g,
        torch.randn(2, kv_heads, head_dim, value_dim, dtype=torch.float64),
    ]


def run(function, inputs):
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    o, state = function(*leaves, 0.3)
    torch.manual_seed(5)
    loss = (o * torch.randn_like(o)).sum() + (state * torch.randn_like(state)).sum()
    return [o, state, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


def assert_same(have, want, tolerance=1e-10):
    for x, y in zip(have, want, strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).abs().max() <= tolerance * max(1.0, float(y.detach().abs().max()))


@pytest.mark.parametrize("length", [1, 7, 64, 130])
@pytest.mark.parametrize("decay", ["none", "mild", "strong", "-inf"])
def test_chunkwise_is_the_recurrence(decay, length):
    inputs = make(decay, length=length)
    assert_same(run(ops.gated_delta, inputs), run(reference.recurrent, inputs))


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1)])
def test_grouped_heads(heads, kv_heads):
    inputs = make("mild", heads=heads, kv_heads=kv_heads, length=20)
    inputs[5] = None
    assert_same(run(ops.gated_delta, inputs), run(reference.recurrent, inputs))


def test_gradcheck():
    inputs = [x[:1].requires_grad_() for x in make("mild", heads=2, kv_heads=1, length=4, head_dim=3, value_dim=2)]
    assert torch.autograd.gradcheck(lambda *x: ops.gated_delta(*x, 0.7), inputs)


def test_segments_compose_to_the_whole():
    inputs = make("mild", length=80)
    whole, final = ops.gated_delta(*inputs, 0.3)
    parts, state = [], inputs[5]
    for start, stop in [(0, 1), (1, 40), (40, 80)]:
        o, state = ops.gated_delta(*[x[:, :, start:stop] for x in inputs[:5]], state, 0.3)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_the_future_does_not_leak():
    inputs = make("mild", length=90)
    before, _ = ops.gated_delta(*inputs, 1.0)
    for x in inputs[:5]:
        x[:, :, 71:] = -0.5
    after, _ = ops.gated_delta(*inputs, 1.0)
    torch.testing.assert_close(before[:, :, :71], after[:, :, :71], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, :, 71:], after[:, :, 71:])


def test_the_delta_rule_overwrites_a_key():
    k = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[3.0], [7.0]]]], dtype=torch.float64)
    o, state = ops.gated_delta(k, k, v, torch.ones(1, 1, 2, dtype=torch.float64), None, None, 1.0)
    torch.testing.assert_close(o.flatten(), torch.tensor([3.0, 7.0], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([7.0, 0.0], dtype=torch.float64))


def test_shape_errors():
    inputs = make("mild", length=5)
    with pytest.raises(ValueError, match=r"lincompile.gated_delta: beta must be \[B, Hkv, T\] = \[2, 2, 5\]"):
        ops.gated_delta(*inputs[:3], inputs[3][:, :, :-1], *inputs[4:], 1.0)
    with pytest.raises(ValueError, match=r"lincompile.gated_delta: log_decay must be \[B, Hkv, T, 1\]"):
        ops.gated_delta(*inputs[:4], inputs[1], inputs[5], 1.0)
