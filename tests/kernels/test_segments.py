"""Stretches of tokens: their summaries, chained, are the recurrence over all of them, whatever they were cut into."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lincompile.kernels.linear_attention import reference, segments

CUTS = [(0, 1, 8, 20), (0, 20), (0, 7, 7, 20)]  # an empty stretch passes everything through


def inputs(decay: str) -> tuple[Tensor, Tensor, Tensor | None]:
    k, v = torch.randn(2, 3, 20, 4, dtype=torch.float64), torch.randn(2, 3, 20, 5, dtype=torch.float64)
    gates = {"none": None, "key": -torch.rand(2, 3, 20, 4).double(), "head": -torch.rand(2, 3, 20, 1).double()}[decay]
    if decay == "key" and gates is not None:
        gates[:, :, 5] = -math.inf
    return k, v, gates


@pytest.mark.parametrize("decay", ["none", "key", "head"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_chained_summaries_are_the_recurrence(decay: str, cuts: tuple[int, ...]) -> None:
    k, v, g = inputs(decay)
    initial = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    _, want = reference.recurrent(k, k, v, g, initial, 1.0, True, False)
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    found = [segments.summary(k[:, :, p], v[:, :, p], None if g is None else g[:, :, p]) for p in parts]
    through = None if g is None else [total.exp() for _, total in found if total is not None]
    states = segments.chain([state for state, _ in found], through, initial)
    assert len(states) == len(parts) + 1 and states[0] is initial
    torch.testing.assert_close(states[-1], want)


def test_matrices_pass_states_through_from_the_left() -> None:
    matrices, added, state = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 5), torch.randn(2, 4, 5)
    states = segments.chain(added, matrices, state)
    want = matrices[2] @ (matrices[1] @ (matrices[0] @ state + added[0]) + added[1]) + added[2]
    torch.testing.assert_close(states[-1], want)
    assert segments.chain(added[:, :, :1], matrices[:, :, :1, :1], state[:, :1])[-1].shape == (2, 1, 5)


@pytest.mark.parametrize("decay", ["none", "key", "head"])
def test_gradients_of_a_summary(decay: str) -> None:
    k, v, g = inputs(decay)
    leaves = [x.requires_grad_() for x in (k, v, g) if x is not None]
    state, total = segments.summary(k, v, g)
    grads = (torch.randn_like(state), None if total is None else torch.randn_like(total))
    outputs = [x for x in (state, total) if x is not None]
    want = torch.autograd.grad(outputs, leaves, [x for x in grads if x is not None])
    have = segments.summary_backward(grads[0], grads[1], *(None if x is None else x.detach() for x in (k, v, g)))
    for a, b in zip(want, [x for x in have if x is not None], strict=True):
        torch.testing.assert_close(a, b)
