"""linear_attention: recurrent == chunkwise == step in float64, values, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lincompile.kernels import ops
from lincompile.kernels.linear_attention import reference

Inputs = list[Tensor | None]

DECAYS = ["none", "key", "head", "key strong", "head strong", "key -inf", "head -inf"]


def make(
    decay: str = "key",
    *,
    batch: int = 2,
    heads: int = 9,
    kv_heads: int = 3,
    length: int = 131,
    head_dim: int = 8,
    value_dim: int = 5,
    normalize: bool = False,
    state: bool = True,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    g = None
    if decay != "none":
        g = -0.1 * rand(batch, kv_heads, length, 1 if decay.startswith("head") else head_dim)
        if decay.endswith("strong"):
            g = g * 100  # down to -10 a step
        if decay.endswith("-inf"):
            g[:, :, ::3] = float("-inf")
    return [
        rand(batch, heads, length, head_dim) + 0.1,
        rand(batch, kv_heads, length, head_dim) + 0.1,
        rand(batch, kv_heads, length, value_dim) - 0.5,
        g,
        rand(batch, kv_heads, head_dim, value_dim + int(normalize)) if state else None,
    ]


def run(function: Any, inputs: Inputs, *options: Any) -> list[Tensor]:
    """Output, state and the gradients of a random functional of both."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    o, state = function(*leaves, *options)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in (o, state)]
    loss = sum((x.double() * weight).sum() for x, weight in zip((o, state), weights, strict=True))
    return [o, state, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


def assert_same(have: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(have) == len(want)
    for i, (x, y) in enumerate(zip(have, want, strict=True)):
        assert torch.isfinite(x).all(), f"result {i} is not finite"
        assert (x - y).abs().max() <= tolerance * max(1.0, float(y.detach().abs().max())), f"result {i}"


@pytest.mark.parametrize("length", [1, 5, 64, 131])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunkwise_is_the_recurrence(decay: str, normalize: bool, length: int) -> None:
    inputs = make(decay, length=length, normalize=normalize)
    want = run(reference.recurrent, inputs, 0.3, True, normalize)
    assert_same(run(ops.linear_attention, inputs, 0.3, True, normalize), want)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1), (4, 4)])
@pytest.mark.parametrize("state", [False, True])
def test_grouped_heads_and_state(heads: int, kv_heads: int, state: bool) -> None:
    inputs = make(heads=heads, kv_heads=kv_heads, state=state, length=37)
    want = run(reference.recurrent, inputs, 1.0, True, False)
    assert_same(run(ops.linear_attention, inputs, 1.0, True, False), want)


def test_query_heads_of_a_group_are_neighbours() -> None:
    q, k, v, g, _ = make(length=20, state=False)
    assert q is not None and k is not None and v is not None and g is not None
    o, _ = ops.linear_attention(q, k, v, g, None, 1.0, True, False)
    expanded = [x.repeat_interleave(3, 1) for x in (k, v, g)]
    want, _ = reference.recurrent(q, *expanded, None, 1.0, True, False)
    torch.testing.assert_close(o, want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_bidirectional_reads_the_total(normalize: bool, state: bool) -> None:
    inputs = make("none", length=23, normalize=normalize, state=state)
    want = run(reference.recurrent, inputs, 0.5, False, normalize)
    have = run(ops.linear_attention, inputs, 0.5, False, normalize)
    assert_same(have, want)
    q, k, v, _, initial = inputs
    assert q is not None and k is not None and v is not None
    scores = torch.einsum("bgrtd,bgsd->bgrts", q.unflatten(1, (3, 3)), k)
    dense = torch.einsum("bgrts,bgse->bgrte", scores, v).flatten(1, 2)
    total = scores.sum(-1).flatten(1, 2).unsqueeze(-1)
    if initial is not None:
        carried = torch.einsum("bgrtd,bgde->bgrte", q.unflatten(1, (3, 3)), initial).flatten(1, 2)
        dense, total = dense + carried[..., : v.shape[-1]], total + carried[..., -1:]
    torch.testing.assert_close(have[0], dense / total if normalize else dense * 0.5)


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_compose_to_the_whole(decay: str) -> None:
    inputs = make(decay, length=100, normalize=True)
    whole, final = ops.linear_attention(*inputs, 0.3, True, True)
    parts, state = [], inputs[4]
    for start, stop in [(0, 1), (1, 40), (40, 41), (41, 100)]:
        piece = [None if x is None else x[:, :, start:stop] for x in inputs[:4]]
        o, state = ops.linear_attention(*piece, state, 0.3, True, True)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_step_is_the_recurrence() -> None:
    q, k, v, g, state = make(length=6, normalize=True)
    assert q is not None and k is not None and v is not None and g is not None
    want, final = reference.recurrent(q, k, v, g, state, 0.3, True, True)
    for t in range(6):
        one = slice(t, t + 1)
        o, state = reference.step(q[:, :, one], k[:, :, one], v[:, :, one], g[:, :, one], state, 0.3, True)
        torch.testing.assert_close(o, want[:, :, one], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("chunk", [1, 2, 16, 32, 128])
@pytest.mark.parametrize("decay", ["none", "key", "key strong"])
def test_the_chunk_size_does_not_matter(decay: str, chunk: int) -> None:
    inputs = make(decay, length=70)
    want = reference.chunkwise(*inputs, 1.0, True, False)
    assert_same(list(reference.chunkwise(*inputs, 1.0, True, False, chunk=chunk)), list(want))


@pytest.mark.parametrize("decay", ["key", "head strong", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(decay: str, causal: bool) -> None:
    if not causal and decay != "none":
        pytest.skip("a bidirectional site has no decay")
    inputs = make(decay, batch=1, heads=4, kv_heads=2, length=7, head_dim=3, value_dim=2, normalize=True)
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: ops.linear_attention(*x, 0.7, causal, True), leaves)


@pytest.mark.parametrize("decay", ["key", "key strong"])
def test_the_future_does_not_leak(decay: str) -> None:
    inputs = make(decay, length=100)
    before, _ = ops.linear_attention(*inputs, 1.0, True, False)
    for x in inputs[:4]:
        assert x is not None
        x[:, :, 57:] = -1.5
    after, _ = ops.linear_attention(*inputs, 1.0, True, False)
    torch.testing.assert_close(before[:, :, :57], after[:, :, :57], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, :, 57:], after[:, :, 57:])


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_stays_near_float64(decay: str) -> None:
    inputs = make(decay, length=200, normalize=True)
    want = run(reference.recurrent, inputs, 0.3, True, True)
    narrow = [None if x is None else x.float() for x in inputs]
    have = run(ops.linear_attention, narrow, 0.3, True, True)
    for x, y in zip(have, want, strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() <= 2e-5 * y.norm()


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    inputs = make("key", length=65)
    narrow = [None if x is None else x.bfloat16() for x in inputs[:4]]
    o, state = ops.linear_attention(*narrow, None, 1.0, True, False)
    want, final = reference.recurrent(*[None if x is None else x.double() for x in narrow], None, 1.0, True, False)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (state - final).norm() <= 1e-5 * final.norm()
    assert (o.double() - want).norm() <= 4e-3 * want.norm()


def test_strided_inputs() -> None:
    inputs = make(length=33)
    strided = [None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_same(
        run(ops.linear_attention, strided, 1.0, True, False), run(ops.linear_attention, inputs, 1.0, True, False)
    )


def test_only_the_gradients_asked_for() -> None:
    q, k, v, g, _ = make(length=9, state=False)
    assert k is not None
    k.requires_grad_()
    o, _ = ops.linear_attention(q, k, v, g, None, 1.0, True, False)
    o.sum().backward()
    assert k.grad is not None and torch.isfinite(k.grad).all()


def test_empty_sequence_returns_the_initial_state() -> None:
    inputs = make(length=0)
    o, state = ops.linear_attention(*inputs, 1.0, True, False)
    assert o.shape == (2, 9, 0, 5)
    torch.testing.assert_close(state, inputs[4])


BAD = {
    "heads": (lambda x: x.__setitem__(0, x[0][:, :8]), "8 query heads don't divide into 3 kv heads"),
    "key length": (lambda x: x.__setitem__(1, x[1][:, :, :-1]), r"k must be \[B, Hkv, T, D\]"),
    "rank": (lambda x: x.__setitem__(2, x[2][0]), r"v must be \[B, Hkv, S, Dv\], got 3 axes"),
    "decay width": (lambda x: x.__setitem__(3, x[3][..., :2]), "log_decay must end in 1 or D = 8, got 2"),
    "state": (lambda x: x.__setitem__(4, x[4][..., :-1]), "initial_state must be"),
    "integers": (lambda x: x.__setitem__(0, x[0].long()), "must be float"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_shape_errors_name_the_op_and_the_argument(case: str) -> None:
    change, message = BAD[case]
    inputs: list[Any] = make(length=5)
    change(inputs)
    with pytest.raises(ValueError, match=f"lincompile.linear_attention: .*{message}"):
        ops.linear_attention(*inputs, 1.0, True, False)


def test_a_bidirectional_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="log_decay needs causal=True"):
        ops.linear_attention(*make(length=5), 1.0, False, False)
