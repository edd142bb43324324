"""The Triton kernels of sliding softmax attention against the definition in float64.

Triton's interpreter has to be chosen before Triton is imported, so without a GPU the cases run in a second process.
"""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels import ops
from lincompile.kernels.softmax_attention import op, reference

pytestmark = needs_triton
# B, H, Hkv, T, S, D, Dv, window, rows of a block, soft cap, padding, strided, dtype
CASES = [
    (2, 3, 1, 33, 33, 8, 5, 5, 16, 0.0, False, True, torch.float32),
    (2, 2, 1, 35, 35, 20, 16, 16, 16, 0.0, True, False, torch.float32),
    (1, 3, 3, 1, 1, 4, 4, 64, 64, 0.0, False, False, torch.float32),
    (1, 3, 1, 20, 20, 16, 17, 1, 16, 3.0, True, True, torch.float32),
    (1, 2, 2, 40, 40, 16, 16, 100, 16, 0.0, True, True, torch.float32),
    (1, 6, 2, 130, 130, 16, 8, 64, 64, 2.0, True, True, torch.float32),
    (1, 3, 1, 150, 150, 8, 8, 100, 64, 0.0, False, False, torch.bfloat16),
    (1, 4, 2, 21, 21, 16, 16, 18, 16, 0.0, True, True, torch.float16),
    (1, 3, 1, 5, 37, 8, 8, 20, 16, 0.0, True, False, torch.float32),  # a chunk after a cache
    (1, 3, 1, 1, 64, 8, 8, 64, 64, 0.0, False, False, torch.float32),  # one decoded token
    (1, 3, 1, 20, 7, 8, 8, 12, 16, 0.0, False, False, torch.float32),  # rows before the first key
]
Case = tuple[int, int, int, int, int, int, int, int, int, float, bool, bool, torch.dtype]


def make(case: Case) -> tuple[list[Tensor], Tensor, Tensor | None]:
    batch, heads, kv_heads, length, keys, dim, value_dim, _, _, _, padded, strided, dtype = case
    sizes = [(heads, length, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim), (heads, length, value_dim)]
    if strided:  # as projections write them, and with gaps between the channels of v
        tensors = [torch.randn(batch, tokens, count, size).transpose(1, 2) for count, tokens, size in sizes]
        tensors[2] = tensors[2].repeat_interleave(2, 3)[..., ::2]
    else:
        tensors = [torch.randn(batch, *size) for size in sizes]
    q, k, v, grad = (x.to(DEVICE, dtype) for x in tensors)
    padding = None
    if padded:
        padding = torch.rand(batch, keys, device=DEVICE) > 0.3
        padding[0] = False  # a row of padding only
        padding[0, keys // 2 :] = batch == 1
    return [q, k, v], grad, padding


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels.softmax_attention import triton as kernels

    torch.manual_seed(0)
    window, block, softcap, dtype = case[7], case[8], case[9], case[12]
    if INTERPRETED:
        monkeypatch.setattr(kernels, "BLOCK", block)
    inputs, grad, padding = make(case)
    options = (padding, "sliding", window, 0.4, softcap)
    assert kernels.supports(*inputs, "sliding", window)
    leaves = [x.double().requires_grad_() for x in inputs]
    want = reference.definition(*leaves, *options)
    want_grads = torch.autograd.grad(want, leaves, grad.double())
    with poisoned():
        have = kernels.forward(*inputs, *options)
        grads, again = (kernels.backward(grad, *inputs, *options) for _ in range(2))
    assert have.dtype == dtype and have.is_contiguous()
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)
    for got, expected, twice, x in zip(grads, want_grads, again, inputs, strict=True):
        assert got.dtype == dtype and got.is_contiguous() and got.shape == x.shape
        assert torch.equal(got, twice)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=4 * tolerance)
    length, keys = case[3:5]
    real = torch.ones(case[0], keys, dtype=torch.bool, device=DEVICE) if padding is None else padding
    rows, columns = (torch.arange(count, device=DEVICE) for count in (length, keys))
    visible = reference._visible(rows, columns, length, keys, "sliding", window)[0, 0] & real[:, None]
    blind, unseen = ~visible.any(2), ~visible.any(1)
    assert blind.any() or (padding is None and length <= keys) or length < keys
    for tensor, nothing in ((have, blind), (grads[0], blind), (grads[1], unseen), (grads[2], unseen)):
        assert (tensor.transpose(1, 2)[nothing] == 0).all()


@needs_kernels
def test_no_token_reads_outside_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels.softmax_attention import triton as kernels

    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setattr(kernels, "BLOCK", 16)
    q, k, v = (torch.randn(1, heads, 48, 8, device=DEVICE) for heads in (2, 1, 1))
    options = (None, "sliding", 7, 0.5, 0.0)
    before = kernels.forward(q, k, v, *options)
    k[:, :, 20] += 1
    v[:, :, 20] += 1
    changed = (kernels.forward(q, k, v, *options) != before).any(-1).any(1)[0].nonzero()[:, 0].tolist()
    assert changed == list(range(20, 27))


@needs_kernels
def test_the_ops_call_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk after a cache, through the step op and its gradient, as on a GPU; other kinds take the reference."""
    from lincompile.kernels.softmax_attention import triton as kernels

    forward, backward = MagicMock(wraps=kernels.forward), MagicMock(wraps=kernels.backward)
    monkeypatch.setattr(kernels, "forward", forward)
    monkeypatch.setattr(kernels, "backward", backward)
    # few queries have a kernel of their own
    monkeypatch.setattr(op, "backend", lambda folder, x, file="triton": kernels if file == "triton" else None)
    monkeypatch.setenv("LINCOMPILE_KERNEL_CHECK", "0")  # which would call them, too
    torch.manual_seed(0)
    sizes = [(4, 3), (2, 3), (2, 3), (2, 9), (2, 9)]
    leaves = [torch.randn(1, *size, 8, device=DEVICE).requires_grad_() for size in sizes]
    o = ops.softmax_attention_step(*leaves, None, "sliding", 5, 0.5, 0.0)[0]
    have = torch.autograd.grad(o.square().sum(), leaves)
    assert forward.call_count == backward.call_count == 1
    q, k, v, k_cache, v_cache = leaves
    keys, values = torch.cat((k_cache, k), 2), torch.cat((v_cache, v), 2)
    want = reference.definition(q, keys, values, None, "sliding", 5, 0.5, 0.0)
    torch.testing.assert_close(o, want)
    for got, expected in zip(have, torch.autograd.grad(want.square().sum(), leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    ops.softmax_attention(q, k, v, None, "causal", 0, 0.5, 0.0)
    assert forward.call_count == 1


@needs_kernels
def test_what_is_left_to_the_reference() -> None:
    from lincompile.kernels.softmax_attention import triton as kernels

    q, k = torch.randn(1, 4, 3, 8, device=DEVICE), torch.randn(1, 2, 3, 8, device=DEVICE)
    assert kernels.supports(q, k, k, "sliding", 1024)
    assert not kernels.supports(q, k, k, "causal", 0)
    assert not kernels.supports(q, k, k, "full", 0)
    assert not kernels.supports(q, k, k, "sliding", 1025)
    assert not kernels.supports(q, k, k.bfloat16(), "sliding", 4)
    assert not kernels.supports(q.double(), k.double(), k.double(), "sliding", 4)
    assert not kernels.supports(q[:, :, :0], k, k, "sliding", 4)
    assert not kernels.supports(q, k, torch.randn(1, 2, 3, 129, device=DEVICE), "sliding", 4)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, len(CASES) + 3)
