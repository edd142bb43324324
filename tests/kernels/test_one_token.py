"""lawcat_inputs and int6_layer: what they are defined by, bad input, tracing; their kernels of one token against the
definition in float64, over poisoned memory.

Without a GPU the kernels' cases run in a second process, under Triton's interpreter.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels import ops
from lincompile.kernels.int6_linear import codes, layer, pack
from lincompile.kernels.lawcat_inputs import reference

on_cpu = pytest.mark.skipif(INTERPRETED, reason="has run without the interpreter")
# Under the interpreter bfloat16 is cut off instead of rounded.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2 if INTERPRETED else 1e-2}
# B, H, kv heads, D, taps, hidden, rank, maps of q and k, dtype
SITES = [
    (1, 9, 3, 64, 4, 576, 16, (3, 3), torch.float32),
    (1, 9, 3, 64, 4, 576, 16, (3, 3), torch.bfloat16),
    (2, 4, 2, 128, 4, 1100, 16, (2, 2), torch.bfloat16),
    (3, 2, 1, 16, 1, 40, 8, (1, 1), torch.float32),
    (2, 6, 2, 24, 3, 72, 33, (2, 1), torch.float32),
]
# rows, channels, dtype
LAYERS = [
    (5, 176, torch.float32),
    (7, 576, torch.bfloat16),
    (3, 2064, torch.float32),
]
# norm before, gated product before, sum after
AROUND = [(False, False, True), (True, False, False), (True, False, True), (False, True, True)]


def site(case: tuple[Any, ...], length: int, masked: bool, norm: bool, device: str = "cpu") -> list[Any]:
    batch, heads, kv_heads, dim, taps, hidden, rank, maps, dtype = case

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    sides: list[Any] = []
    for count, own in ((heads, maps[0]), (kv_heads, maps[1])):
        sides += [random(batch, length, count, dim).transpose(1, 2), random(count * dim, taps)]
        sides += [random(batch, count * dim, taps - 1), random(own, dim, dim, scale=2 / dim**0.5), random(own, 1, dim)]
    rows = kv_heads * 2 * dim
    gate = [
        random(rank, hidden, scale=hidden**-0.5),
        random(rows, rank),
        random(rows, scale=16.0),
    ]  # a good part of the log-decays at the floor
    mask = torch.rand(batch, length, device=device) > 0.4 if masked else None
    weight = (torch.rand(hidden, device=device) + 0.5).to(dtype) if norm else None
    return [*sides, random(batch, length, hidden), weight, *gate, mask, 1e-5, kv_heads, 16.0, -1.0]


def wide(items: list[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in items]


def compare(have: Any, want: Any, tolerance: float) -> None:
    for a, b in zip(have, want, strict=True):
        assert a.shape == b.shape
        if b.numel() and float(b.norm()):
            assert float((a.double() - b).norm() / b.norm()) < tolerance
        else:
            assert not a.any()


@on_cpu
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_inputs_are_the_ops_they_stand_for(length: int, masked: bool) -> None:
    args = site(SITES[4], length, masked, norm=True)
    q, k, (x, weight, down, up, bias, mask, eps, kv_heads, rate, lowest) = args[:5], args[5:10], args[10:]
    have = torch.ops.lincompile.lawcat_inputs(*args)
    feature_q, state_q = ops.hedgehog_features(*q, mask, False)
    feature_k, state_k = ops.hedgehog_features(*k, mask, True)
    z = functional.linear(functional.rms_norm(x, (x.shape[-1],), weight, eps), down)
    want = (feature_q, feature_k, ops.decay_gate(z, up, bias, mask, kv_heads, rate, lowest), state_q, state_k)
    torch.testing.assert_close(have, want, rtol=0, atol=0)
    fakes = torch.library.opcheck(torch.ops.lincompile.lawcat_inputs, tuple(args), test_utils="test_faketensor")
    assert set(fakes.values()) == {"SUCCESS"}


@on_cpu
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda t: t[:-1], "conv_q must be"),
        (2, lambda t: t[:, :-1], "state_q must be"),
        (3, lambda t: t[:0], "don't divide into 0 maps"),
        (5, lambda t: t[:, :, :0], "q and k must be of the same tokens"),
        (10, lambda t: t.double(), "must be of one type"),
        (11, lambda t: t[1:], "norm_weight must be"),
        (13, lambda t: t[:-1], "don't divide into 2 kv heads"),
        (15, lambda t: t.long(), "mask must be bool"),
        (17, lambda t: 3, "kv_heads must be the heads of k"),
        (18, lambda t: 0.0, "temperature must be above 0"),
        (19, lambda t: 0.5, "lowest must be below 0"),
    ],
)
def test_inputs_that_dont_fit_are_named(place: int, change: Any, message: str) -> None:
    args = site(SITES[4], 3, True, norm=True)
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=message):
        torch.ops.lincompile.lawcat_inputs(*args)


@needs_triton
@needs_kernels
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", SITES)
def test_one_kernel_makes_all_inputs(case: tuple[Any, ...], masked: bool, norm: bool) -> None:
    from lincompile.kernels.lawcat_inputs import triton as kernels

    args = site(case, 1, masked, norm, DEVICE)
    assert kernels.supports(*args)
    with poisoned():
        have = kernels.forward(*args)
        again = kernels.forward(*args)
    assert all(torch.equal(a, b) for a, b in zip(have, again, strict=True))
    compare(have, reference.forward(*wide(args)), TOLERANCE[case[-1]])
    assert not kernels.supports(*site(case, 2, masked, norm, DEVICE))
    assert not kernels.supports(*wide(args))


def packed(rows: int, width: int, dtype: torch.dtype, around: tuple[bool, bool, bool], device: str) -> list[Any]:
    """Arguments of int6_layer: one token on a GPU or under the interpreter, three on a CPU."""
    norm, gated, residual = around
    values, scale = codes.quantize_weight(torch.randn(rows, width))
    tokens = 1 if device == DEVICE else 3
    x = torch.randn(tokens, 1, width * (1 + gated))
    weight = torch.rand(width) + 0.5 if norm else None
    other, bias = torch.randn(tokens, 1, rows) if residual else None, torch.randn(rows) if residual else None
    cast = [None if t is None else t.to(device, dtype) for t in (x, weight, other)]
    planes = [t.to(device) for t in (*pack.pack(values), scale)]
    return [*cast[:2], 1e-5, gated, cast[2], *planes, None if bias is None else bias.to(device), 128, "a8"]


@on_cpu
@pytest.mark.parametrize("around", [*AROUND, (False, False, False)])
def test_a_layer_is_the_ops_it_stands_for(around: tuple[bool, bool, bool]) -> None:
    args = packed(7, 96, torch.float32, around, "cpu")
    x, weight, eps, gated, residual, *rest = [None if t is None else t for t in args]
    if gated:
        x = functional.silu(x[..., :96]) * x[..., 96:]
    elif weight is not None:
        x = functional.rms_norm(x, (96,), weight, eps)
    want = torch.ops.lincompile.int6_linear(x, *rest)
    want = want if residual is None else residual + want
    torch.testing.assert_close(torch.ops.lincompile.int6_layer(*args), want, rtol=0, atol=0)
    checks = torch.library.opcheck(torch.ops.lincompile.int6_layer, tuple(args), test_utils="test_faketensor")
    assert set(checks.values()) == {"SUCCESS"}


@on_cpu
@pytest.mark.parametrize(
    ("around", "place", "value", "message"),
    [
        ((True, False, False), 3, True, "exclude each other"),
        ((True, False, False), 1, torch.ones(95), "norm_weight must be"),
        ((True, False, False), 1, torch.ones(96).double(), "norm_weight must be"),
        ((False, False, True), 4, torch.ones(1, 1, 1), "residual must be"),
        ((False, True, False), 0, torch.ones(3, 1, 193), r"gated needs x"),
        ((False, False, False), 0, torch.ones(3, 1, 96).long(), "x must be float"),
        ((True, False, False), 5, torch.zeros(7, 47, dtype=torch.uint8), "weight_hi must be"),
        ((False, True, False), 7, torch.zeros(7, 2, dtype=torch.float16), "weight_scale must be"),
    ],
)
def test_layers_that_dont_fit_are_named(around: Any, place: int, value: Any, message: str) -> None:
    args = packed(7, 96, torch.float32, around, "cpu")
    args[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.lincompile.int6_layer(*args)


@pytest.fixture(scope="module")
def gluon(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether the Gluon kernel of one token runs here."""
    from lincompile.kernels.int6_linear import triton as kernels

    if INTERPRETED:
        import gluon_interpreted

        gluon_interpreted.load("lincompile.kernels.int6_linear.gluon_token", tmp_path_factory.mktemp("gluon"))
    return INTERPRETED or kernels.hopper(torch.device("cuda"))


@needs_triton
@needs_kernels
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("case", LAYERS)
def test_one_token_takes_the_layer_whole(case: tuple[Any, ...], around: tuple[bool, bool, bool], gluon: bool) -> None:
    from lincompile.kernels.int6_linear import tiles as rules
    from lincompile.kernels.int6_linear import triton as kernels

    rows, width, dtype = case
    args = packed(rows, width, dtype, around, DEVICE)
    x, weight, eps, gated, residual, *planes, bias, _, activation = args
    want = layer.plain(*wide(args[:5]), *planes, bias, 128, activation)  # type: ignore[arg-type]
    forms = [(False, rows), *([(True, rows), (True, 9000)] if gluon else [])]  # the last is an output head's
    tiles = [rules.narrow_config(-(-width // 128), count, form) for form, count in forms]
    ways: list[Any] = [functools.partial(kernels.narrow, config=tile) for tile in tiles]
    ways = [*ways, kernels.vector] if width <= rules.NARROW else [kernels.vector]
    for launch in ways:
        y = torch.full((1, rows), float("nan"), device=DEVICE, dtype=dtype)
        more = kernels.Around(weight, eps, gated, None if residual is None else residual.view(1, -1))
        with poisoned():
            launch(x.view(1, -1), tuple(planes), bias, y, activation, around=more)
        # A norm that is summed up in another order may take a channel to another code.
        compare([y.view_as(want)], [want], max(TOLERANCE[dtype], 2e-3))
    if DEVICE == "cuda":
        compare([torch.ops.lincompile.int6_layer(*args)], [want], max(TOLERANCE[dtype], 2e-3))
    if weight is not None:
        args[1] = torch.stack((weight, -weight), 1)[:, 0]  # every other number of what it lies in
        found = kernels.int6_layer(*args[:-2], activation)
        compare([found], [want], max(TOLERANCE[dtype], 2e-3))
    x[0, 0, 3] = float("nan")
    y = kernels.int6_layer(*args[:-2], activation)
    assert y is not None and y.isnan().all()


@needs_triton
@on_cpu
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passed=4 * len(SITES) + len(AROUND) * len(LAYERS))
