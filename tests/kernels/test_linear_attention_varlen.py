"""linear_attention_varlen: every sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lincompile.kernels import ops
from lincompile.kernels.linear_attention import reference

LENGTHS = (5, 0, 1, 70)


def make(decay: str, normalize: bool, lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Tensor | None], Tensor]:
    torch.manual_seed(3)
    total = sum(lengths)
    g = None if decay == "none" else -2 * torch.rand(1, 2, total, 1 if decay == "head" else 4, dtype=torch.float64)
    inputs = [
        torch.rand(1, total, 4, 4, dtype=torch.float64).transpose(1, 2),
        torch.rand(1, 2, total, 4, dtype=torch.float64),
        torch.randn(1, 2, total, 3, dtype=torch.float64),
        g,
        torch.rand(len(lengths), 2, 4, 3 + int(normalize), dtype=torch.float64),
    ]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return [None if x is None else x.requires_grad_() for x in inputs], bounds


def apart(inputs: list[Tensor | None], bounds: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The token-by-token recurrence of each sequence."""
    outputs, states = [], []
    for i, (a, b) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:], strict=False)):
        q, k, v, g = (None if x is None else x[:, :, a:b] for x in inputs[:4])
        state = None if inputs[4] is None else inputs[4][i : i + 1]
        assert q is not None and k is not None and v is not None
        o, end = reference.recurrent(q, k, v, g, state, 0.3, True, normalize)
        outputs.append(o)
        states.append(end)
    return torch.cat(outputs, 2), torch.cat(states, 0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "key"])
@pytest.mark.parametrize("state", [False, True])
def test_values_states_and_gradients(decay: str, normalize: bool, state: bool) -> None:
    inputs, bounds = make(decay, normalize)
    if not state:
        inputs[4] = None
    want = apart(inputs, bounds, normalize)
    have = ops.linear_attention_varlen(*inputs, bounds, 0.3, normalize)
    weights = [torch.randn_like(x) for x in want]
    leaves = [x for x in inputs if x is not None]
    pairs = [
        *zip(have, want, strict=True),
        *zip(torch.autograd.grad(have, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True),
    ]
    for x, y in pairs:
        assert x.shape == y.shape
        assert (x - y).norm() <= 1e-10 * y.norm().clamp_min(1)


def test_one_sequence_is_the_plain_op() -> None:
    inputs, bounds = make("key", True, (40,))
    have = ops.linear_attention_varlen(*inputs, bounds.int(), 0.3, True)
    want = ops.linear_attention(*inputs, 0.3, True, True)
    assert all(torch.equal(x, y) for x, y in zip(have, want, strict=True))


def test_fullgraph_compile() -> None:
    inputs, bounds = make("key", True)
    run = torch.compile(lambda *x: ops.linear_attention_varlen(*x, bounds, 0.3, True), fullgraph=True, backend="eager")
    have, want = run(*inputs), ops.linear_attention_varlen(*inputs, bounds, 0.3, True)
    assert all(torch.equal(x, y) for x, y in zip(have, want, strict=True))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 5, 3, 76], "must rise from 0 to the 76 tokens"),
        ([0, 5], "must rise from 0 to the 76 tokens"),
        ([1, 76], "must rise from 0 to the 76 tokens"),
        ([0], "at least two entries"),
    ],
)
def test_bounds_that_do_not_fit(bounds: list[int], message: str) -> None:
    inputs, _ = make("key", False)
    inputs[4] = None
    with pytest.raises(ValueError, match=message):
        ops.linear_attention_varlen(*inputs, torch.tensor(bounds), 1.0, False)


def test_what_else_does_not_fit() -> None:
    inputs, bounds = make("key", False)
    with pytest.raises(ValueError, match=r"initial_state must be \[sequences, Hkv, D, Dv\]"):
        ops.linear_attention_varlen(*inputs, torch.tensor([0, 76]), 1.0, False)
    with pytest.raises(ValueError, match="int32 or int64"):
        ops.linear_attention_varlen(*inputs, bounds.float(), 1.0, False)
    q, k, v = (torch.rand(2, 2, 4, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"B = 1"):
        ops.linear_attention_varlen(q, k, v, None, None, torch.tensor([0, 4]), 1.0, False)
