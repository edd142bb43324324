"""The Triton kernels of sequences side by side and of attention without a causal order, against float64.

Without a GPU the cases run under Triton's interpreter, in a second process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels.linear_attention import reference, varlen_reference

# lengths, decay, normalise, initial state, D, Dv, shortest segment in chunks
VARLEN = [
    ((70, 0, 1, 130), "key", True, True, 16, 16, 1),
    ((64, 128, 5), "key strong", False, False, 16, 16, 8),
    ((30, 80), "none", True, True, 24, 20, 1),
    ((3, 100), "head", False, True, 80, 16, 8),
]
# queries, keys, normalise, initial state, D, Dv
BIDIRECTIONAL = [(70, 70, True, True, 16, 16), (5, 130, True, False, 40, 24), (70, 200, False, True, 16, 20)]


def make(decay: str, normalize: bool, length: int, dim: int, value_dim: int) -> list[Tensor | None]:
    """q, k, v, log_decay, no state: four query and two kv heads."""
    torch.manual_seed(length)
    strongest = 10.0 if decay.endswith("strong") else 0.1
    g = None
    if decay != "none":
        g = -strongest * torch.rand(1, 2, length, 1 if decay == "head" else dim, device=DEVICE)
    return [
        torch.rand(1, length, 4, dim, device=DEVICE).transpose(1, 2),
        torch.rand(1, 2, length, dim, device=DEVICE),
        torch.randn(1, 2, length, value_dim, device=DEVICE),
        g,
        None,
    ]


def compare(have: list[Tensor | None], want: list[Tensor]) -> None:
    found = [x for x in have if x is not None]
    assert len(found) == len(want)
    for x, y in zip(found, want, strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).norm() <= 2e-5 * y.norm() + 1e-5


@needs_kernels
@pytest.mark.parametrize("case", VARLEN, ids=str)
def test_sequences_side_by_side(
    case: tuple[tuple[int, ...], str, bool, bool, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lincompile.kernels.linear_attention import triton as kernels
    from lincompile.kernels.linear_attention import triton_plan

    lengths, decay, normalize, state, dim, value_dim, shortest = case
    monkeypatch.setattr(triton_plan, "MIN_SEGMENT_CHUNKS", shortest)
    inputs = make(decay, normalize, sum(lengths), dim, value_dim)
    if state:
        inputs[4] = torch.rand(len(lengths), 2, dim, value_dim + int(normalize), device=DEVICE)
    leaves = [None if x is None else x.double() for x in inputs]
    want_o, want_state = varlen_reference.forward(*leaves, lengths, 0.3, normalize)
    grad_o, grad_state = torch.randn_like(want_o), torch.randn_like(want_state)
    grads = varlen_reference.backward(grad_o, grad_state, *leaves, lengths, 0.3, normalize)
    want = [want_o, want_state, *[x for x in grads if x is not None]]
    with poisoned():
        o, end = kernels.chunkwise(*inputs, 0.3, True, normalize, lengths)
        have = kernels.chunkwise_backward(grad_o.float(), grad_state.float(), o, *inputs, 0.3, True, normalize, lengths)
    compare([o, end, *have], want)


@needs_kernels
@pytest.mark.parametrize("case", BIDIRECTIONAL, ids=str)
def test_no_causal_order(case: tuple[int, int, bool, bool, int, int]) -> None:
    from lincompile.kernels.linear_attention import triton as kernels

    queries, keys, normalize, state, dim, value_dim = case
    inputs = make("none", normalize, keys, dim, value_dim)
    if state:
        inputs[4] = torch.rand(1, 2, dim, value_dim + int(normalize), device=DEVICE)
    inputs[0] = torch.rand(1, queries, 4, dim, device=DEVICE).transpose(1, 2)
    leaves = [None if x is None else x.double() for x in inputs]
    want_o, want_state = reference.chunkwise(*leaves, 0.3, False, normalize)
    grad_o, grad_state = torch.randn_like(want_o), torch.randn_like(want_state)
    grads = reference.chunkwise_backward(grad_o, grad_state, *leaves, 0.3, False, normalize)
    want = [want_o, want_state, *[x for x in grads if x is not None]]
    with poisoned():
        o, end = kernels.chunkwise(*inputs, 0.3, False, normalize)
        have = kernels.chunkwise_backward(grad_o.float(), grad_state.float(), o, *inputs, 0.3, False, normalize)
    compare([o, end, *have], want)


@needs_kernels
def test_a_first_use_with_sequences_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels import first_use, ops
    from lincompile.kernels.linear_attention import triton as kernels
    from lincompile.kernels.linear_attention import varlen

    monkeypatch.setattr(varlen, "backend", lambda op, x: kernels)  # on a CPU, too
    q, k, v, g, _ = (x if x is None else x.requires_grad_() for x in make("key", True, 90, 16, 16))
    bounds, state = torch.tensor([0, 40, 40, 90]), torch.rand(3, 2, 16, 17, device=DEVICE)
    monkeypatch.setattr(first_use, "_KNOWN", {})
    o, _ = ops.linear_attention_varlen(q, k, v, g, state, bounds, 0.3, True)
    o.sum().backward()
    assert list(first_use._KNOWN.values()) == [True, True]
    right = kernels.chunkwise
    monkeypatch.setattr(kernels, "chunkwise", lambda *args: tuple(1.2 * x for x in right(*args)))
    first_use._KNOWN.clear()
    with pytest.warns(UserWarning, match="linear_attention_varlen differ from the reference"):
        fallen_back, _ = ops.linear_attention_varlen(q, k, v, g, state, bounds, 0.3, True)
    assert (fallen_back - o).norm() <= 2e-5 * o.norm()


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, len(VARLEN) + len(BIDIRECTIONAL) + 1)
