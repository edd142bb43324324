"""The Triton kernels of short_conv against the float64 reference.

Triton's interpreter has to be chosen before Triton is imported, so without a GPU the cases run in a second process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels.short_conv import reference

pytestmark = needs_triton
# batch, T, channels, taps, carried state, dtype
CASES = [
    (2, 1, 5, 4, True, torch.float32),
    (1, 2, 3, 4, True, torch.float32),
    (2, 3, 7, 2, False, torch.float32),
    (1, 70, 66, 4, False, torch.float32),
    (1, 150, 5, 8, True, torch.float32),
    (1, 9, 4, 1, True, torch.float32),
    (2, 67, 6, 3, True, torch.bfloat16),
]


@needs_kernels
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_state_and_gradients(case: tuple[int, int, int, int, bool, torch.dtype], strided: bool) -> None:
    from lincompile.kernels.short_conv import triton as kernels

    batch, length, channels, taps, state, dtype = case
    x = torch.randn(batch, length, channels, device=DEVICE)
    if strided:
        x = torch.randn(batch, channels, 2 * length, device=DEVICE)[..., ::2].transpose(1, 2)
    x = x.to(dtype)
    weight = torch.randn(channels, taps, device=DEVICE)
    initial = torch.randn(batch, channels, taps - 1, device=DEVICE).to(dtype) if state else None
    assert kernels.supports(x, weight, initial)

    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, initial)]
    want_y, want_state = reference.recurrent(*leaves)  # type: ignore[arg-type]
    grads = [torch.randn_like(want_y).to(dtype), torch.randn_like(want_state).to(dtype)]
    present: list[Tensor] = [t for t in leaves if t is not None]
    outputs = [(t, g.double()) for t, g in zip((want_y, want_state), grads, strict=True) if t.requires_grad]
    want = torch.autograd.grad([t for t, _ in outputs], present, [g for _, g in outputs], allow_unused=True)

    with poisoned():
        y, final = kernels.forward(x, weight, initial)
        have = [t for t in kernels.backward(*grads, x, weight, initial) if t is not None]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.equal(final.double(), want_state.detach())
    torch.testing.assert_close(y.double(), want_y, rtol=tolerance, atol=tolerance)
    for got, expected in zip(have, want, strict=True):
        assert got.numel() == 0 or expected is not None
        if expected is not None:
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=10 * tolerance)


@needs_kernels
def test_what_is_left_to_the_reference() -> None:
    from lincompile.kernels.short_conv import triton as kernels

    x, weight = torch.randn(1, 3, 4), torch.randn(4, 9)
    assert kernels.supports(x, weight[:, :8], None)
    assert not kernels.supports(x, weight, None)
    assert not kernels.supports(x.double(), weight[:, :4], None)
    assert not kernels.supports(x[:, :0], weight[:, :4], None)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, 2 * len(CASES) + 1)
