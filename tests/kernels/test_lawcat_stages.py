"""hedgehog_features and decay_gate: the references against what the attention modules compute, bad input, tracing;
the Triton kernels against the float64 references.

Triton's interpreter has to be chosen before Triton is imported, so without a GPU the cases run in a second process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels import ops
from lincompile.kernels.decay_gate import reference as gate_reference
from lincompile.kernels.hedgehog_features import reference as feature_reference
from lincompile.passes.linearization.methods import (
    GATE_TEMPERATURE,
    LOWEST,
    DecayGate,
    HedgehogMap,
    ShortConv,
    SiteShape,
    keep_real,
    method_class,
)

on_cpu = pytest.mark.skipif(INTERPRETED, reason="has run without the interpreter")
# B, H, maps, T, D, taps (0: no convolution), carried state, mask, masked output, dtype
FEATURES = [
    (1, 4, 2, 70, 16, 4, False, False, False, torch.float32),
    (1, 4, 2, 66, 20, 4, True, True, True, torch.float32),
    (2, 2, 2, 1, 16, 4, True, False, False, torch.float32),
    (2, 2, 1, 2, 8, 3, True, True, False, torch.float32),
    (1, 2, 2, 33, 24, 0, False, True, True, torch.float32),
    (1, 3, 1, 17, 16, 4, False, True, True, torch.bfloat16),
]
# B, kv heads, T, features of a head, rank, mask, floor, dtype
GATES = [
    (1, 2, 130, 32, 16, False, LOWEST, torch.float32),
    (2, 2, 20, 40, 16, True, LOWEST, torch.float32),
    (2, 1, 1, 16, 5, True, None, torch.float32),
    (1, 2, 17, 300, 16, True, -0.25, torch.bfloat16),
]


def make_features(case: tuple[Any, ...], device: str = "cpu") -> list[Any]:
    batch, heads, maps, length, dim, taps, state, masked, masked_output, dtype = case
    x = torch.randn(batch, length, heads, dim, device=device, dtype=dtype).transpose(1, 2)
    conv = torch.randn(heads * dim, taps, device=device) * 0.5 if taps else None
    initial = torch.randn(batch, heads * dim, taps - 1, device=device).to(dtype) if state else None
    weight = torch.randn(maps, dim, dim, device=device) * 0.3
    bias = torch.randn(maps, 1, dim, device=device)
    mask = torch.rand(batch, length, device=device) > 0.3 if masked else None
    return [x, conv, initial, weight, bias, mask, masked_output]


def make_gate(case: tuple[Any, ...], device: str = "cpu") -> list[Any]:
    batch, heads, length, features, rank, masked, lowest, dtype = case
    z = torch.randn(batch, length, rank, device=device, dtype=dtype)
    weight, bias = torch.randn(heads * features, rank, device=device), torch.randn(heads * features, device=device) * 16
    mask = torch.rand(batch, length, device=device) > 0.3 if masked else None
    return [z, weight, bias, mask, heads, GATE_TEMPERATURE, lowest]


def compare(kernels: Any, reference: Any, args: list[Any], dtype: torch.dtype) -> None:
    """Values and gradients of a kernel module against the reference in float64, in NaN-poisoned memory."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    want = reference.forward(*wide)
    want = want if isinstance(want, tuple) else (want,)
    grads = [torch.randn_like(x).to(dtype) for x in want]
    want_grads = reference.backward(*[g.double() for g in grads], *wide)
    with poisoned():
        have = kernels.forward(*args)
        have = have if isinstance(have, tuple) else (have,)
        have_grads = kernels.backward(*grads, *args)
        again = kernels.backward(*grads, *args)
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 1e-5
    for got, repeated, expected in zip([*have, *have_grads], [*have, *again], [*want, *want_grads], strict=True):
        assert (got is None) == (expected is None)
        if got is not None and got.numel():
            assert got.shape == expected.shape
            assert torch.equal(got, repeated)
            error = (got.double() - expected).norm() / expected.norm().clamp_min(1e-9)
            assert error <= tolerance, f"{tuple(got.shape)}: {error:.1e}"


@needs_triton
@needs_kernels
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_feature_kernels(case: tuple[Any, ...]) -> None:
    from lincompile.kernels.hedgehog_features import triton as kernels

    args = make_features(case, DEVICE)
    assert kernels.supports(*args[:5])
    assert not kernels.supports(args[0].double(), *args[1:5])
    compare(kernels, feature_reference, args, case[-1])


@needs_triton
@needs_kernels
@pytest.mark.parametrize("case", GATES, ids=str)
def test_gate_kernels(case: tuple[Any, ...]) -> None:
    from lincompile.kernels.decay_gate import triton as kernels

    args = make_gate(case, DEVICE)
    assert kernels.supports(*args[:3])
    assert not kernels.supports(args[0].double(), *args[1:3])
    compare(kernels, gate_reference, args, case[-1])


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, len(FEATURES) + len(GATES))


@on_cpu
@pytest.mark.parametrize("masked", [False, True])
def test_features_are_what_the_modules_compute(masked: bool) -> None:
    heads, maps, dim = 4, 2, 8
    conv, hedgehog = ShortConv(heads * dim).double(), HedgehogMap(maps, dim).double()
    for parameter in (*conv.parameters(), *hedgehog.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 9, heads, dim, dtype=torch.float64).transpose(1, 2)
    mask = torch.rand(2, 9) > 0.3 if masked else None
    queries = hedgehog.grouped(conv(x, mask), heads // maps)
    args = (conv.weight, None, hedgehog.weight, hedgehog.bias)
    torch.testing.assert_close(ops.hedgehog_features(x, *args, mask, False)[0], queries)
    masked_features = ops.hedgehog_features(x, *args, mask, True)[0]
    torch.testing.assert_close(masked_features, keep_real(queries, mask, head_axis=True))
    plain = ops.hedgehog_features(x[:, :maps], None, None, *args[2:], None, False)[0]
    torch.testing.assert_close(plain, hedgehog(x[:, :maps]))


@on_cpu
@pytest.mark.parametrize("lowest", [None, LOWEST])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gate_is_what_the_module_computes(masked: bool, lowest: float | None) -> None:
    gate = DecayGate(12, 2, 6, lowest).double()
    with torch.no_grad():
        gate.bias[::2] = -40.0
    x, mask = torch.randn(2, 9, 12, dtype=torch.float64), torch.rand(2, 9) > 0.3 if masked else None
    z = torch.nn.functional.linear(x, gate.down)
    have, want = ops.decay_gate(z, gate.up, gate.bias, mask, 2, GATE_TEMPERATURE, lowest), gate(x, mask)
    torch.testing.assert_close(have, want)
    assert float(want.detach().min()) == LOWEST if lowest else float(want.detach().min()) < -2.4


@on_cpu
def test_nothing_is_learned_below_the_floor_and_nan_stays() -> None:
    z = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-40.0, 2.0, float("nan")], dtype=torch.float64, requires_grad=True)
    out = ops.decay_gate(z, weight, bias, None, 1, GATE_TEMPERATURE, LOWEST)
    assert torch.equal(out[..., 0], torch.full_like(out[..., 0], LOWEST)) and bool(out[..., 2].isnan().all())
    (slopes,) = torch.autograd.grad(out.sum(), bias)
    assert slopes[0] == 0 and slopes[1] > 0 and slopes[2].isnan()


@on_cpu
def test_gradients_and_carried_state() -> None:
    def leaves(args: list[Any]) -> list[Any]:
        return [x.double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]

    case = (1, 4, 2, 5, 3, 4, True, True, True, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ops.hedgehog_features(*a), leaves(make_features(case)))
    plain = (1, 2, 2, 3, 3, 0, False, True, True, torch.float64)
    features: Callable[..., Tensor] = lambda *a: ops.hedgehog_features(*a)[0]  # noqa: E731
    assert torch.autograd.gradcheck(features, leaves(make_features(plain)))
    for lowest in (None, LOWEST):
        gate = leaves(make_gate((1, 2, 4, 3, 2, True, lowest, torch.float64)))
        assert torch.autograd.gradcheck(lambda *a: ops.decay_gate(*a), gate)

    x, *rest = make_features((2, 4, 2, 9, 3, 4, True, False, False, torch.float32))
    whole, final = ops.hedgehog_features(x, *rest)
    first, state = ops.hedgehog_features(x[:, :, :2], *rest)
    second, state = ops.hedgehog_features(x[:, :, 2:], rest[0], state, *rest[2:])
    torch.testing.assert_close(torch.cat((first, second), 2), whole)
    torch.testing.assert_close(state, final)


@on_cpu
@pytest.mark.parametrize("length", [1, 6])
def test_opcheck(length: int) -> None:
    def check(op: Any, args: list[Any]) -> None:
        args = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        torch.library.opcheck(op, tuple(args))

    check(ops.hedgehog_features, make_features((2, 4, 2, length, 3, 4, True, True, True, torch.float32)))
    check(ops.hedgehog_features, make_features((2, 2, 2, length, 3, 0, False, False, False, torch.float32)))
    check(ops.decay_gate, make_gate((2, 2, length, 3, 2, True, LOWEST, torch.float32)))


@on_cpu
def test_bad_input_is_named() -> None:
    x, conv, initial, weight, bias, mask, _ = make_features((1, 4, 2, 5, 3, 4, True, True, True, torch.float32))
    with pytest.raises(ValueError, match=r"hedgehog_features: 4 heads don't divide into 3 maps"):
        ops.hedgehog_features(x, conv, initial, weight.new_zeros(3, 3, 3), bias, mask, True)
    with pytest.raises(ValueError, match=r"bias must be \[M, 1, D\] = \[2, 1, 3\]"):
        ops.hedgehog_features(x, conv, initial, weight, bias[..., :1], mask, True)
    with pytest.raises(ValueError, match=r"initial_state needs a conv_weight"):
        ops.hedgehog_features(x, None, initial, weight, bias, mask, True)
    with pytest.raises(ValueError, match=r"mask must be bool"):
        ops.hedgehog_features(x, conv, initial, weight, bias, mask.float(), True)
    z, up, offset, mask, heads, *_ = make_gate((1, 2, 4, 3, 2, True, None, torch.float32))
    with pytest.raises(ValueError, match=r"decay_gate: 6 rows of weight don't divide into 4 kv heads"):
        ops.decay_gate(z, up, offset, mask, 4, 16.0, None)
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0.0"):
        ops.decay_gate(z, up, offset, mask, heads, 0.0, None)
    with pytest.raises(ValueError, match=r"lowest must be below 0 \(None = no floor\), got 0.0"):
        ops.decay_gate(z, up, offset, mask, heads, 16.0, 0.0)


@on_cpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["gla", "hedgehog", "lawcat"])
def test_modules_compute_the_same_fused(name: str, masked: bool) -> None:
    module = method_class(name)(SiteShape(4, 2, 8, 8, 12, 0.5, True)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if module.floored:
        torch.nn.init.normal_(module.gate.bias, std=16.0)  # half of them at the floor
    tall = [torch.randn(2, 9, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    leaves = [*tall, torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)]
    mask = torch.rand(2, 9) > 0.3 if masked else None

    def run(fuse: bool) -> list[Tensor]:
        module.fuse = fuse
        out = module(*leaves, mask)
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()], allow_unused=True)]

    assert not module.fused(leaves[0]), "on a CPU the plain form, unless told otherwise"
    for have, want in zip(run(True), run(False), strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have, want)


@on_cpu
def test_fused_modules_under_autocast_and_compile() -> None:
    module = method_class("lawcat")(SiteShape(4, 2, 8, 8, 12, 0.5, True))
    q, k, v = (torch.randn(1, 9, heads, 8, dtype=torch.bfloat16).transpose(1, 2) for heads in (4, 2, 2))
    x = torch.randn(1, 9, 12, dtype=torch.bfloat16)

    def run(fuse: bool) -> list[Tensor]:
        module.fuse = fuse
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True) if fuse else module
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(q, k, v, x)
        return [out, *torch.autograd.grad(out.float().square().sum(), list(module.parameters()))]

    for have, want in zip(run(True), run(False), strict=True):
        assert have.dtype == want.dtype
        assert (have.double() - want.double()).norm() <= 0.03 * want.double().norm() + 1e-6
