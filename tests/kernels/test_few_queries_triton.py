"""The Triton kernel for softmax attention of few queries, and its step form, against the definition in float64.

Triton's interpreter has to be chosen before Triton is imported, so without a GPU the cases run in a second process.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels import first_use, ops
from lincompile.kernels.softmax_attention import op, reference

pytestmark = needs_triton
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# B, H, Hkv, T, keys before, D, Dv, kind, window, soft cap, padding, strided, dtype
CASES = [
    (1, 9, 3, 1, 1023, 64, 64, "causal", 0, 0.0, False, True, torch.bfloat16),  # SmolLM2's token
    (2, 3, 1, 1, 200, 8, 5, "causal", 0, 0.0, True, True, torch.float32),
    (1, 4, 4, 1, 0, 16, 16, "causal", 0, 0.0, False, False, torch.float32),  # the first token
    (2, 4, 2, 5, 60, 20, 16, "full", 0, 0.0, True, False, torch.float32),
    (1, 6, 2, 7, 130, 16, 8, "causal", 0, 2.0, True, True, torch.float32),
    (1, 8, 1, 4, 300, 16, 17, "causal", 0, 0.0, True, True, torch.float16),
    (1, 2, 2, 3, 150, 256, 130, "causal", 0, 0.0, False, False, torch.float32),  # blocks of 16 keys
    (1, 3, 1, 5, 300, 8, 8, "sliding", 20, 0.0, True, False, torch.float32),
    (1, 4, 2, 1, 64, 48, 48, "sliding", 200, 3.0, False, True, torch.bfloat16),
    (3, 32, 1, 1, 70, 16, 16, "full", 0, 0.0, False, False, torch.float32),
]
Case = tuple[Any, ...]


def make(case: Case) -> tuple[list[Tensor], Tensor | None]:
    """q, the keys and values of caches and what follows them, the keys' padding."""
    batch, heads, kv_heads, length, past, dim, value_dim, _, _, _, padded, strided, dtype = case
    sizes = [(heads, length, dim), (kv_heads, past + length, dim), (kv_heads, past + length, value_dim)]
    if strided:  # as projections write them, and with gaps between the channels of v
        tensors = [torch.randn(batch, tokens, count, size).transpose(1, 2) for count, tokens, size in sizes]
        tensors[2] = tensors[2].repeat_interleave(2, 3)[..., ::2]
    else:
        tensors = [torch.randn(batch, *size) for size in sizes]
    padding = None
    if padded:
        padding = (torch.rand(batch, past + length + 3, device=DEVICE) > 0.3)[:, 3:]
        padding[0] = False  # a row of padding only
        padding[0, (past + length) // 2 :] = batch == 1
    return [x.to(DEVICE, dtype) for x in tensors], padding


def close(have: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert have.dtype == dtype and have.is_contiguous()
    torch.testing.assert_close(have.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("per", [None, 1, 3, 1 << 30])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_caches(case: Case, per: int | None) -> None:
    """Blocks of keys by rule, a program each, three each and all in one program."""
    from lincompile.kernels.softmax_attention import triton_few as kernels

    (q, keys, values), padding = make(case)
    past, kind, window, softcap, dtype = case[4], *case[7:10], case[12]
    options = (padding, kind, window, 0.4, softcap)
    assert kernels.supports(q, keys, values)
    want = reference.definition(q.double(), keys.double(), values.double(), *options)
    caches, new = (keys[:, :, :past], values[:, :, :past]), (keys[:, :, past:], values[:, :, past:])
    with poisoned():
        have = kernels.forward(q, keys, values, *options, per=per)
        stepped = kernels.step(q, *new, *caches, *options, per=per)
        again = kernels.step(q, *new, *caches, *options, per=per)
    close(have, want, dtype)
    close(stepped[0], want, dtype)
    assert all(torch.equal(a, b) for a, b in zip(stepped, again, strict=True))
    for made, expected in zip(stepped[1:], (keys, values), strict=True):
        assert made.is_contiguous() and torch.equal(made, expected)
    if padding is not None and kind == "full":
        blind = ~padding.any(1)
        assert blind[0] and (have[blind] == 0).all()


@needs_kernels
def test_queries_before_the_first_key_are_zero() -> None:
    from lincompile.kernels.softmax_attention import triton_few as kernels

    q, k = torch.randn(1, 4, 8, 16, device=DEVICE), torch.randn(1, 2, 3, 16, device=DEVICE)
    options = (None, "causal", 0, 0.4, 0.0)
    have = kernels.forward(q, k, k, *options)
    assert (have[:, :, :5] == 0).all() and have[:, :, 5:].any(-1).all()
    close(have, reference.definition(q.double(), k.double(), k.double(), *options), torch.float32)


@needs_kernels
def test_the_caches_are_copied_bit_for_bit() -> None:
    """What numbers they hold is nothing to the copy: NaN, infinities and zeros of both signs too."""
    from lincompile.kernels.softmax_attention import triton_few as kernels

    bits = torch.randint(-(1 << 15), 1 << 15, (2, 2, 2, 100, 24), dtype=torch.int16, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        keys, values = bits.view(dtype)
        q = torch.randn(2, 4, 1, 24, device=DEVICE, dtype=dtype)
        made = kernels.step(
            q, *(x[:, :, 99:] for x in (keys, values)), *(x[:, :, :99] for x in (keys, values)),
            None, "causal", 0, 0.4, 0.0,
        )  # fmt: skip
        for have, want in zip(made[1:], bits, strict=True):
            assert torch.equal(have.view(torch.int16), want)


@needs_kernels
def test_what_is_not_a_number_comes_through() -> None:
    from lincompile.kernels.softmax_attention import triton_few as kernels

    q, k, v = (torch.randn(1, heads, count, 8, device=DEVICE) for heads, count in ((4, 2), (2, 150), (2, 150)))
    k[0, 1, 149, 3] = float("nan")
    have = kernels.forward(q, k, v, None, "causal", 0, 0.4, 0.0)
    assert have[:, 2:, 1].isnan().all() and have[:, :2].isfinite().all() and have[:, 2:, 0].isfinite().all()


@needs_kernels
def test_the_ops_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and step with the comparison on first use, tokens in turn as a session decodes them, and gradients."""
    from lincompile.kernels.softmax_attention import triton_few as kernels

    calls = {name: MagicMock(wraps=getattr(kernels, name)) for name in ("forward", "step")}
    for name, call in calls.items():
        monkeypatch.setattr(kernels, name, call)
    monkeypatch.setattr(op, "backend", lambda folder, x, file="triton": kernels if file == "triton_few" else None)
    monkeypatch.delenv("LINCOMPILE_KERNEL_CHECK", raising=False)
    monkeypatch.setattr(first_use, "_KNOWN", {})
    monkeypatch.setattr(first_use, "_compile", lambda *args: None)  # calls them, too
    q, k, v = (torch.randn(3, heads, 8, 16, device=DEVICE) for heads in (4, 2, 2))
    mask = torch.ones(3, 9, dtype=torch.bool, device=DEVICE)
    mask[1, :3] = False
    want = ops.softmax_attention(q, k, v, mask[:, 1:], "causal", 0, 0.4, 0.0)
    assert calls["forward"].call_count == 2, "the comparison and the call"
    close(want, reference.definition(*(x.double() for x in (q, k, v)), mask[:, 1:], "causal", 0, 0.4, 0.0), q.dtype)
    k_cache, v_cache = k[:, :, :0], v[:, :, :0]
    for start, stop in [(0, 4), (4, 5), (5, 8)]:
        part = slice(start, stop)
        o, k_cache, v_cache = ops.softmax_attention_step(
            q[:, :, part], k[:, :, part], v[:, :, part], k_cache, v_cache, mask[:, : stop + 1], "causal", 0, 0.4, 0.0
        )
        torch.testing.assert_close(o, want[:, :, part])
    assert torch.equal(k_cache, k) and torch.equal(v_cache, v)
    assert all(first_use._KNOWN.values()) and calls["step"].call_count == 3 + sum(
        "step" in key[0] for key in first_use._KNOWN
    )
    leaves = [x.clone().requires_grad_() for x in (q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], k[:, :, :7], v[:, :, :7])]
    o = ops.softmax_attention_step(*leaves, mask, "causal", 0, 0.4, 0.0)[0]
    have = torch.autograd.grad(o.square().sum(), leaves)
    whole = torch.cat((leaves[3], leaves[1]), 2), torch.cat((leaves[4], leaves[2]), 2)
    expected = reference.definition(leaves[0], *whole, mask[:, 1:], "causal", 0, 0.4, 0.0)
    for a, b in zip(have, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("form", ["forward", "step"])
def test_a_wrong_kernel_isnt_used(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared on the beginning of a call longer than that, padding included."""
    from lincompile.kernels.softmax_attention import triton_few as kernels

    def wrong(*args: Any, per: int | None = None) -> Any:
        right = getattr(reference, form)(*args)
        return right * 1.5 if form == "forward" else (right[0], right[1] * 1.5, right[2])

    monkeypatch.setattr(kernels, form, wrong)
    monkeypatch.setattr(op, "backend", lambda folder, x, file="triton": kernels if file == "triton_few" else None)
    monkeypatch.delenv("LINCOMPILE_KERNEL_CHECK", raising=False)
    monkeypatch.setattr(first_use, "_KNOWN", {})
    q, keys = torch.randn(1, 2, 2, 8, device=DEVICE), torch.randn(1, 2, 700, 8, device=DEVICE)
    options = (torch.rand(1, 700, device=DEVICE) > 0.2, "causal", 0, 0.4, 0.0)
    with pytest.warns(UserWarning, match=f"softmax_attention {form}, few queries, 4? ?.*differ from the reference"):
        if form == "forward":
            have = ops.softmax_attention(q, keys, keys, *options)
        else:
            parts = (keys[:, :, 698:], keys[:, :, 698:], keys[:, :, :698], keys[:, :, :698])
            have, made, _ = ops.softmax_attention_step(q, *parts, *options)
            assert torch.equal(made, keys)
    close(have, reference.definition(q.double(), keys.double(), keys.double(), *options), torch.float32)


@needs_kernels
def test_what_is_left_to_other_kernels() -> None:
    from lincompile.kernels.softmax_attention import triton_few as kernels

    q, k = torch.randn(1, 4, 3, 8, device=DEVICE), torch.randn(1, 2, 3, 8, device=DEVICE)
    assert kernels.supports(q, k, k) and kernels.supports(q, k, k, 1 << 20)
    assert not kernels.supports(q, k, k, (1 << 30) - 2)
    assert not kernels.supports(q, k, k.bfloat16())
    assert not kernels.supports(q.double(), k.double(), k.double())
    assert not kernels.supports(q[:, :, :0], k, k)
    assert not kernels.supports(q, k[:, :, :0], k[:, :, :0])
    assert not kernels.supports(torch.randn(1, 4, 17, 8, device=DEVICE), k, k)
    assert not kernels.supports(q, k, torch.randn(1, 2, 3, 257, device=DEVICE))


@needs_kernels
def test_keys_are_shared_out_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels.softmax_attention import triton_few as kernels

    monkeypatch.setattr(kernels, "processors", lambda device: 132)

    def found(heads: int, keys: int, dim: int = 64, kind: str = "causal", window: int = 0) -> tuple[int, ...]:
        q, k = torch.empty(1, heads, 1, dim, dtype=torch.bfloat16), torch.empty(1, heads, 1, dim, dtype=torch.bfloat16)
        split = kernels.shares(q, k, k, keys - 1, kind, window)
        return split.block, split.first, split.per, split.count

    assert found(3, 1) == (64, 0, 1, 1)
    assert found(3, 1024) == (64, 0, 1, 16)
    assert found(3, 1 << 20) == (64, 0, 187, 88)  # 88 * 3 programs for 132 multiprocessors
    assert found(300, 5000) == (64, 0, 79, 1)
    assert found(3, 1000, dim=256) == (32, 0, 2, 16)
    assert found(3, 1000, kind="sliding", window=100) == (64, 0, 1, 16), "a step copies all keys"
    q, k = torch.empty(1, 2, 1, 8), torch.empty(1, 1, 1000, 8)
    assert kernels.shares(q, k, k, None, "sliding", 100).first == 900 // 64


@needs_kernels
def test_each_recorded_launch_has_counters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels.softmax_attention import triton_few as kernels

    zeros, state = torch.zeros, {"recording": False, "stream": 1}
    monkeypatch.setattr(torch, "zeros", lambda count, dtype, device: zeros(count, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["recording"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: MagicMock(cuda_stream=state["stream"]))
    monkeypatch.setattr(kernels, "_SHARED", {})
    monkeypatch.setattr(kernels, "_STORES", {})
    monkeypatch.setattr(kernels, "COUNTERS", 32)

    def take(count: int, recording: bool, stream: int = 1) -> Tensor:
        state.update(recording=recording, stream=stream)
        return kernels.counters(count, torch.device("cuda"))

    def places(tensor: Tensor) -> set[int]:
        return {tensor.data_ptr() + 4 * index for index in range(tensor.shape[0])}

    early = take(3, True)  # before any store: a part of the recording
    shared = take(3, False)
    assert take(2, False).data_ptr() == shared.data_ptr() != take(3, False, stream=2).data_ptr()
    taken = [early, shared, *(take(3, True) for _ in range(10))]
    assert all(each.shape[0] >= 3 and each.data_ptr() % 16 == 0 for each in taken)
    assert len(set().union(*map(places, taken))) == sum(each.shape[0] for each in taken), "two share a counter"
    assert take(2000, False).shape[0] == 2000 and len(kernels._STORES[torch.device("cuda")]) == 2


@needs_triton
def test_flash_attention_keeps_what_it_serves_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide heads that need no mask and have no cache to be copied; float32 isn't its."""
    from lincompile.kernels.softmax_attention import triton_few as kernels

    monkeypatch.setattr(op, "backend", lambda folder, x, file="triton": kernels)
    monkeypatch.setattr(op, "trusted", lambda *args, **options: True)
    monkeypatch.setattr(kernels, "supports", lambda *args: True)
    monkeypatch.setattr(kernels, "compared", lambda *args: 1)

    def served(dim: int, dtype: torch.dtype, kind: str = "full", softcap: float = 0.0, padded: bool = False) -> bool:
        q, k = (torch.zeros(1, heads, 1, dim, dtype=dtype) for heads in (4, 2))
        padding = torch.ones(1, 1, dtype=torch.bool) if padded else None
        return op._few(q, k, k, padding, kind, 1, 1.0, softcap, function="forward") is not None

    bf16, wide = torch.bfloat16, torch.zeros(1, 2, 1, 128, dtype=torch.bfloat16)
    assert served(64, bf16) and served(128, torch.float32)
    assert not served(128, bf16) and not served(80, torch.float16) and not served(128, bf16, "causal")
    assert served(128, bf16, "sliding") and served(128, bf16, softcap=30.0) and served(128, bf16, padded=True)
    assert op._few(wide, wide, wide, wide, wide, None, "full", 1, 1.0, 0.0, function="step") is kernels.step


@pytest.mark.gpu
@pytest.mark.parametrize("past", [0, 1, 63, 1023, 8191, 262143])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_recorded_steps_on_a_gpu(past: int, dtype: torch.dtype) -> None:
    """Three layers in one graph, each with counters of its own, replayed on new inputs beside eager calls."""
    from lincompile.kernels.softmax_attention import triton_few as kernels

    def inputs() -> list[Tensor]:
        sizes = [(9, 1), (3, 1), (3, 1), (3, past), (3, past)]
        return [torch.randn(1, *size, 64, device="cuda", dtype=dtype) for size in sizes]

    def check(args: list[Tensor], made: Any) -> None:
        keys, values = torch.cat((args[3], args[1]), 2), torch.cat((args[4], args[2]), 2)
        want = reference.definition(*(x.double() for x in (args[0], keys, values)), None, "causal", 0, 0.125, 0.0)
        error = float((made[0].double() - want).norm() / want.norm())
        assert error < {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype], error
        assert torch.equal(made[1], keys) and torch.equal(made[2], values)

    layers = [inputs() for _ in range(3)]
    options = (None, "causal", 0, 0.125, 0.0)
    for layer in layers:
        assert kernels.supports(*layer[:3], past)
        check(layer, ops.softmax_attention_step(*layer, *options))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [ops.softmax_attention_step(*layer, *options) for layer in layers]
    for _ in range(3):
        for layer in layers:
            for old, new in zip(layer, inputs(), strict=True):
                old.copy_(new)
        for out in made:
            for tensor in out:
                tensor.fill_(float("nan"))
        graph.replay()
        first = [[tensor.clone() for tensor in out] for out in made]
        graph.replay()
        for layer, out, before in zip(layers, made, first, strict=True):
            check(layer, out)
            assert all(torch.equal(a, b) for a, b in zip(out, before, strict=True)), "two runs differ"
            direct = kernels.step(*layer, *options)
            assert all(torch.equal(a, b) for a, b in zip(out, direct, strict=True))
    assert all(not store.any() for stores in kernels._STORES.values() for store in stores)
    assert all(not shared.any() for shared in kernels._SHARED.values())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chained_kernels_wait_for_each_other(case: Case) -> None:
    """A step reads what the step in front has just written, through ten of them in a graph."""
    from lincompile.kernels.softmax_attention import triton_few as kernels

    (q, keys, values), _ = make((*case[:10], False, *case[11:]))
    past, kind, window, softcap, dtype = case[4], *case[7:10], case[12]

    def run(function: Any) -> list[Tensor]:
        caches = [keys[:, :, :past].clone(), values[:, :, :past].clone()]
        out, length = q, q.shape[2]
        for _ in range(10):
            new = [x[:, :, past : past + length] for x in (keys, values)]
            o, *caches = function(out, *new, *caches, None, kind, window, 0.4, softcap)
            out = q + o.mean(-1, keepdim=True) if case[5] != case[6] else q + o
        return [out, *caches]

    want = run(reference.step)
    run(kernels.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = run(kernels.step)
    for _ in range(5):
        graph.replay()
        torch.testing.assert_close(have[0], want[0], rtol=5 * TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])
        assert all(torch.equal(a, b) for a, b in zip(have[1:], want[1:], strict=True))


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, 4 * len(CASES) + 10)
