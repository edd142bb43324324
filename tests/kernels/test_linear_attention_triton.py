"""The Triton kernels of linear_attention against the float64 reference.

Triton's interpreter has to be chosen before Triton is imported, so without a GPU the cases run in a second process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, run_under_the_interpreter

from lincompile.kernels.linear_attention import reference
from lincompile.passes.linearization.methods import LOWEST

pytestmark = needs_triton

# decay, normalise, initial state, T, D, Dv
CASES = [
    ("none", False, False, 70, 16, 16),
    ("none", True, True, 140, 16, 16),
    ("key", False, True, 70, 16, 20),
    ("key", True, True, 200, 16, 16),
    ("key", False, True, 3, 16, 16),
    ("key", True, True, 1, 16, 40),
    ("key", False, False, 1, 16, 16),
    ("head", True, False, 64, 24, 16),
    ("key strong", True, True, 130, 16, 16),
    ("head strong", False, True, 70, 24, 16),
    ("key -inf", False, True, 140, 16, 16),
    ("key", True, True, 33, 80, 70),
    # keys in pieces: 64 + 64, 64 + 64 + 16
    ("key", True, True, 70, 128, 16),
    ("head strong", True, True, 20, 144, 16),
    ("none", False, False, 20, 128, 32),
]

# In segments of several chunks. Where every step decays alike, half a chunk decays by about 30, 42 and 58: two halves
# lie between the middles of neighbouring chunks, and float32 ends at exp(-87).
LONG_CASES = [
    ("key 0.93", True, True, 200, 16, 16),
    ("key 1.3", True, True, 200, 16, 16),
    ("key 1.8", True, False, 200, 16, 16),
    ("head 1.8", False, True, 130, 16, 16),
    ("key", True, True, 200, 16, 16),
    ("key strong", False, True, 130, 16, 16),
    # chunks halved twice, four and six times, and each differently
    ("key 2.5", True, True, 64, 16, 16),
    ("key 12.0", False, True, 64, 16, 16),
    ("key 50.0", True, True, 64, 16, 16),
    ("key mixed", True, True, 200, 16, 16),
    # channels that forget at once beside channels that carry from segment to segment
    ("key beside", True, True, 640, 16, 16),
]


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short sequences into segments too."""
    if INTERPRETED or torch.cuda.is_available():
        from lincompile.kernels.linear_attention import triton_plan

        monkeypatch.setattr(triton_plan, "MIN_SEGMENT_CHUNKS", 1)


def make(decay: str, normalize: bool, state: bool, length: int, head_dim: int, value_dim: int) -> list[Tensor | None]:
    torch.manual_seed(length)
    g = None
    if decay != "none":
        g = -0.1 * torch.rand(1, 2, length, 1 if decay.startswith("head") else head_dim, device=DEVICE)
        if decay.endswith("strong"):
            g = g * 100
        elif decay.endswith("-inf"):
            g[:, :, ::3] = float("-inf")
        elif decay.endswith("mixed"):
            g = g * torch.logspace(0, 3, 7, device=DEVICE).repeat_interleave(32)[:length, None]
        elif decay.endswith("beside"):
            g[..., ::2] = -1.1
            g[:, :, 70::101, ::2] = -40.0
            g[..., 1::2] *= 1e-3
        elif decay[-1].isdigit():
            g = torch.full_like(g, -float(decay.split()[1]))
    initial = torch.rand(1, 2, head_dim, value_dim + int(normalize), device=DEVICE)
    return [
        torch.rand(1, length, 4, head_dim, device=DEVICE).transpose(1, 2),
        torch.rand(1, 2, length, head_dim, device=DEVICE),
        torch.randn(1, 2, length, value_dim, device=DEVICE),
        g,
        initial if state else None,
    ]


@needs_kernels
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_segments(case: tuple[str, bool, bool, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels.linear_attention import triton_plan

    monkeypatch.setattr(triton_plan, "MIN_SEGMENT_CHUNKS", 8)
    test_values_states_and_gradients(case)


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_states_and_gradients(case: tuple[str, bool, bool, int, int, int]) -> None:
    from lincompile.kernels.linear_attention import triton as kernels

    inputs, normalize = make(*case), case[1]
    leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
    want_o, want_state = reference.recurrent(*leaves, 0.3, True, normalize)
    grad_o, grad_state = torch.randn_like(want_o), torch.randn_like(want_state)
    present = [x for x in leaves if x is not None]
    want = [want_o, want_state, *torch.autograd.grad((want_o, want_state), present, (grad_o, grad_state))]

    o, state = kernels.chunkwise(*inputs, 0.3, True, normalize)
    grads = kernels.chunkwise_backward(grad_o.float(), grad_state.float(), o, *inputs, 0.3, True, normalize)
    have = [o, state, *[x for x in grads if x is not None]]
    assert len(have) == len(want)
    for x, y in zip(have, want, strict=True):
        assert torch.isfinite(x).all()
        # Where decays leave nothing, a gradient is what is left of numbers around 1, to a few of float32's digits each.
        assert (x - y).norm() <= 2e-5 * y.norm() + 4e-7 * max(y.numel() ** 0.5, 25)


@needs_kernels
@pytest.mark.parametrize("decay", ["key", "key strong"])
def test_the_future_does_not_leak(decay: str) -> None:
    from lincompile.kernels.linear_attention import triton as kernels

    inputs = make(decay, True, False, 150, 16, 16)
    before, _ = kernels.chunkwise(*inputs, 1.0, True, True)
    for x in inputs[:3]:
        assert x is not None
        x[:, :, 77:] = 2.0
    after, _ = kernels.chunkwise(*inputs, 1.0, True, True)
    assert torch.equal(before[:, :, :77], after[:, :, :77])
    assert not torch.equal(before[:, :, 77:], after[:, :, 77:])


@needs_kernels
def test_the_state_of_a_segment_alone() -> None:
    """What sequence-parallel ranks exchange: in one segment and in several, wide heads, every kind of decay."""
    from lincompile.kernels.linear_attention import segments
    from lincompile.kernels.linear_attention import triton as kernels

    for case in (CASES[3], CASES[5], CASES[7], CASES[10], CASES[11], CASES[12], CASES[14]):
        _, k, v, g, _ = make(*case)
        assert k is not None and v is not None
        values = torch.nn.functional.pad(v, (0, 1), value=1.0) if case[1] else v
        want, _ = segments.summary(k.double(), values.double(), None if g is None else g.double())
        have = kernels.segment_state(k, v, g, case[1])
        assert have.shape == want.shape
        assert (have - want).norm() <= 2e-5 * want.norm(), case


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_at_the_floor_take_the_fast_way(dtype: torch.dtype) -> None:
    """All of them, and as many as may be among others, whose sums are rounded; one step below the floor is enough."""
    from lincompile.kernels.linear_attention.triton_launch import _decays
    from lincompile.kernels.linear_attention.triton_plan import prepare

    def wide(g: Tensor) -> Tensor:
        q, v = torch.ones_like(g), torch.ones_like(g)
        return _decays(prepare(q, q, v, g, 1.0, True, None))[2]

    floor = torch.full((1, 2, 200, 16), LOWEST, device=DEVICE, dtype=dtype)
    assert not wide(floor).any()
    noise = torch.rand_like(floor) * 2e-3 - 1
    assert not wide(torch.where(torch.rand_like(floor) > 0.5, noise, floor)).any()
    below = floor.clone()
    below[:, 1, 70, 3] = -1.125
    assert wide(below).tolist() == [0, 1]


@needs_kernels
def test_what_is_left_to_the_reference() -> None:
    from lincompile.kernels.linear_attention import triton as kernels

    q, k, v, g, state = make("key", False, True, 5, 16, 16)
    assert q is not None and k is not None and v is not None and g is not None and state is not None
    assert kernels.supports(q, k, v, g, state)
    assert not kernels.supports(q.double(), k, v, g, None)
    assert not kernels.supports(q, k, v, g, state.double())
    assert not kernels.supports(q[:, :, :0], k[:, :, :0], v[:, :, :0], g[:, :, :0], None)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, len(CASES) + len(LONG_CASES) + 6)
