"""short_conv: the token-by-token window against the vectorised form, state and gradients."""

from __future__ import annotations

import pytest
import torch

from lincompile.kernels import ops
from lincompile.kernels.short_conv import reference


def make(length, channels=6, taps=4):
    torch.manual_seed(1)
    return [
        torch.randn(2, length, channels, dtype=torch.float64),
        torch.randn(channels, taps, dtype=torch.float64),
        torch.randn(2, channels, taps - 1, dtype=torch.float64),
    ]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 33])
def test_vectorised_is_the_definition(length, taps, state):
    x, weight, initial = make(length, taps=taps)
    initial = initial if state else None
    want, final = reference.recurrent(x, weight, initial)
    have, have_final = ops.short_conv(x, weight, initial)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(have_final, final)


def test_is_torch_conv1d():
    x, weight, _ = make(20)
    want = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.transpose(1, 2), (3, 0)), weight.unsqueeze(1), groups=weight.shape[0]
    )
    torch.testing.assert_close(ops.short_conv(x, weight, None)[0], want.transpose(1, 2))


@pytest.mark.parametrize("length", [1, 2, 6])
def test_gradcheck(length):
    inputs = [x.requires_grad_() for x in make(length)]
    assert torch.autograd.gradcheck(lambda *a: ops.short_conv(*a), inputs)
    assert torch.autograd.gradcheck(lambda *a: ops.short_conv(*a, None), inputs[:2])


def test_segments_compose_to_the_whole():
    x, weight, state = make(17)
    whole, final = ops.short_conv(x, weight, state)
    parts = []
    for start, stop in [(0, 1), (1, 3), (3, 17)]:
        y, state = ops.short_conv(x[:, start:stop], weight, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_last_tap_is_the_current_token():
    x = torch.randn(1, 5, 2)
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2)
    torch.testing.assert_close(ops.short_conv(x, weight, None)[0], x)


def test_shape_errors():
    x, weight, initial = make(5)
    with pytest.raises(ValueError, match=r"lincompile.short_conv: weight must be \[C, W\] = \[6, 4\]"):
        ops.short_conv(x, weight[:5], None)
    with pytest.raises(ValueError, match=r"initial_state must be \[B, C, W - 1\] = \[2, 6, 3\]"):
        ops.short_conv(x, weight, initial[..., 1:])
