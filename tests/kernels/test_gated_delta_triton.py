"""The Triton scans of gated_delta against the float64 recurrence, values, states and every gradient.

Triton's interpreter has to be chosen before Triton is imported, so without a GPU the cases run in a second process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels.gated_delta import reference

pytestmark = needs_triton
# decay, initial state, T, D, Dv
CASES = [
    ("none", False, 70, 16, 16),
    ("mild", True, 130, 20, 24),
    ("strong", True, 70, 16, 80),
    ("-inf", True, 70, 40, 16),
    ("mild", True, 2, 16, 16),
]


def make(decay: str, state: bool, length: int, head_dim: int, value_dim: int) -> list[Tensor | None]:
    torch.manual_seed(length)
    g = None
    if decay != "none":
        g = -(10.0 if decay == "strong" else 0.1) * torch.rand(1, 2, length, 1, device=DEVICE)
        if decay == "-inf":
            g[:, :, ::3] = float("-inf")
    return [
        torch.randn(1, length, 4, head_dim, device=DEVICE).transpose(1, 2),
        torch.nn.functional.normalize(torch.randn(1, 2, length, head_dim, device=DEVICE), dim=-1),
        torch.randn(1, 2, length, value_dim, device=DEVICE),
        torch.rand(1, 2, length, device=DEVICE),
        g,
        torch.randn(1, 2, head_dim, value_dim, device=DEVICE) if state else None,
    ]


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_states_and_gradients(case: tuple[str, bool, int, int, int]) -> None:
    from lincompile.kernels.gated_delta import triton as kernels

    inputs = make(*case)
    q, k, v, *rest = inputs
    assert q is not None and k is not None and v is not None
    assert kernels.supports(q, k, v, *rest)
    assert not kernels.supports(q.double(), k, v, *rest) and not kernels.supports(q, k[:, :, :1], v, *rest)
    leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
    want_o, want_state = reference.recurrent(*leaves, 0.3)  # type: ignore[arg-type]
    grads = [torch.randn_like(want_o), torch.randn_like(want_state)]
    wanted = [x for x in leaves if x is not None]
    want = [want_o, want_state, *torch.autograd.grad((want_o, want_state), wanted, grads)]

    scans = reference.Scans(kernels.scan_forward, kernels.scan_backward)
    with poisoned():
        have = [*reference.chunkwise(*inputs, 0.3, scans=scans)]  # type: ignore[arg-type]
        narrow = [x.float() for x in grads]
        have += [
            x
            for x in reference.chunkwise_backward(*narrow, *inputs, 0.3, scans=scans)  # type: ignore[arg-type]
            if x is not None
        ]
    assert len(have) == len(want)
    for x, y in zip(have, want, strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).norm() <= 3e-5 * y.norm() + 1e-5


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, len(CASES))
