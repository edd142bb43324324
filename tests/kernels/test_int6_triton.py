"""The Triton kernels of int6_linear: in Triton's interpreter everywhere, bit for bit on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lincompile.kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from lincompile.kernels.int6_linear import codes as q
from lincompile.kernels.int6_linear import layer, pack, reference

ROOT = Path(__file__).resolve().parents[2]

# Run in a process of its own: Triton decides on import whether its kernels are interpreted. Takes two folders: the
# tests and one to write to.
INTERPRETED = """
import itertools, pathlib, sys
import torch
from lincompile.kernels.int6_linear import codes as q, pack, reference, tiles as rules, triton as kernels
sys.path.insert(0, sys.argv[1])
import gluon_interpreted, triton_cases
gluon_interpreted.load("lincompile.kernels.int6_linear.gluon_token", pathlib.Path(sys.argv[2]))
torch.manual_seed(0)
for width in (176, 576):
    for tokens in (1, 17):
        codes, scale = q.quantize_weight(torch.randn(5, width))
        planes = (*pack.pack(codes), scale)
        x, bias = torch.randn(tokens, width), torch.randn(5)
        for activation in ("a8", "a6") if width == 176 else ("a8",):
            got = kernels.int6_linear(x, *planes, bias, 128, activation).double()
            expected = reference.int6_linear_definition(x, *planes, bias, 128, activation)
            error = float((got - expected).norm() / expected.norm())
            assert error < 1e-6, (width, tokens, activation, error)
narrow_shapes = ((176, 11), (576, 37), (1536, 9), (128, 3), (2048, 5))
cases = [*itertools.product(narrow_shapes, (False, True)), *(((width, 70), "head") for width in (176, 576, 1024, 2048))]
for (width, rows), gluon in cases:
    codes, scale = q.quantize_weight(torch.randn(rows, width))
    config = rules.narrow_config(scale.shape[1], 9000 if gluon == "head" else rows, bool(gluon))
    assert ("WALKS" in config) == (gluon == "head")
    planes, x, bias = (*pack.pack(codes), scale), torch.randn(1, width), torch.randn(rows)
    x[0, 16:24], x[0, 128:256] = 3.5, 0.0
    for activation in ("a8", "a6"):
        y = torch.full((1, rows), float("nan"))
        kernels.narrow(x, planes, bias, y, activation, config)
        expected = reference.int6_linear_definition(x, *planes, bias, 128, activation)
        assert float((y - expected).norm() / expected.norm()) < 1e-6, (width, activation, gluon)
    for bad in ("nan", "inf", "-inf"):
        x[0, 5] = float(bad)
        kernels.narrow(x, planes, None, y, "a8", config)
        assert y.isnan().all(), (bad, gluon)
codes, scale = q.quantize_weight(torch.randn(70, 176))
planes = (*pack.pack(codes), scale)
unpacked = kernels.unpack_to_int8(planes, 176)
assert torch.equal(unpacked[:, :176] >> 2, codes) and not unpacked[:, 176:].any()
codes, scale = q.quantize_weight(torch.randn(21, 1200))  # more groups than a program's, the last a partial one
unpacked = kernels.unpack_to_int8((*pack.pack(codes), scale), 1200)
assert torch.equal(unpacked[:, :1200] >> 2, codes) and not unpacked[:, 1200:].any()
scale = torch.rand(37, 3).half()
ordered = torch.full((3, 48), float("nan"))
kernels.kernels.scale_kernel[(3, 2)](scale, ordered, 37, 48, 3, FACTOR=0.25, BN=16, GB=2)
read = ordered.view(3, 3, 4, 2, 2).transpose(2, 3).reshape(3, 48)  # by thread, eighth and neighbour: as its rows lie
assert torch.equal(read[:, :37], scale.t().float() / 4) and not read[:, 37:].any()
codes, scale = q.quantize_weight(torch.randn(70, 176))
planes = (*pack.pack(codes), scale)
x = torch.randn(5, 176)
expected = reference.int6_linear_definition(x, *planes, None, 128, "a8")
y = torch.full((5, 70), float("nan"))
config = {"BM": 16, "BN": 64, "STAGES": 2, "BAND": 2, "num_warps": 4}
kernels.large(x, planes, None, y, "a8", config)
assert float((y - expected).norm() / expected.norm()) < 1e-6
split = {"BM": 16, "BN": 64, "STAGES": 2, "SPLIT": 2, "num_warps": 4}
wide = torch.randn(5, 576)
codes, scale = q.quantize_weight(torch.randn(70, 576))
planes = (*pack.pack(codes), scale)
y = torch.full((5, 70), float("nan"))
bias = torch.randn(70)
kernels.small(wide, planes, bias, y, "a6", split)
expected = reference.int6_linear_definition(wide, *planes, bias, 128, "a6")
assert float((y - expected).norm() / expected.norm()) < 1e-6
for width, tokens in ((256, 5), (208, 5), (576, 33), (1024, 17), (2048, 3), (336, 70), (576, 1), (1024, 1)):
    codes, scale = q.quantize_weight(torch.randn(40, width), bits=8)
    x = torch.randn(tokens, width)
    got = kernels.int8_linear(x, codes, scale, bias[:40], 128, "a8").double()
    expected = reference.int8_linear_definition(x, codes, scale, bias[:40], 128, "a8")
    assert float((got - expected).norm() / expected.norm()) < 1e-6
assert kernels.int6_linear(wide[:0], *planes, None, 128, "a8").shape == (0, 70)
assert rules.few_config(0, 70, 256)["SHARES"] == 1
rows_codes, rows_scale = kernels.quantize_activation(wide, "a8")
few_codes, few_scale = kernels.quantize_activation(wide, "a8", pad=4, columns=True, fragment=4)
assert few_codes.shape == (8, 640) and few_scale.shape == (5, 8)
slices = few_codes.view(2, 5, 4, 4, 32).permute(0, 2, 1, 3, 4)[:, :, :, [0, 2, 1, 3]].reshape(8, 640)
assert torch.equal(slices[:5], rows_codes)
assert torch.equal(few_scale[:, :5].t(), rows_scale)
from lincompile.kernels import first_use
import warnings
first_use._KNOWN.clear()
right, kernels.small = kernels.small, lambda x, planes, bias, y, activation, config: y.fill_(1.0)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    y = kernels.int6_linear(wide, *planes, None, 128, "a8")
assert any("differ from the reference" in str(each.message) for each in said)
expected = reference.int6_linear_definition(wide, *planes, None, 128, "a8")
assert float((y - expected).norm() / expected.norm()) < 1e-6
kernels.small = right
first_use._KNOWN.clear()
wide[2, 130] = float("nan")
y = kernels.int6_linear(wide, *planes, None, 128, "a8")
assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()
print("interpreted kernels agree")
"""


def test_interpreted_kernels_equal_the_definition(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton isn't installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "interpreted kernels agree" in done.stdout


def test_every_tile_of_one_token_is_compared_on_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison takes some of the rows, with the tile of all of them; layers of other tiles don't speak for it."""
    pytest.importorskip("triton", reason="Triton isn't installed")
    from lincompile.kernels import first_use
    from lincompile.kernels.int6_linear import triton as kernels

    ran: list[tuple[int, int]] = []

    def narrow(
        x: Tensor, planes: Any, bias: Any, y: Tensor, activation: str, config: dict[str, Any], around: Any
    ) -> None:
        ran.append((y.shape[1], config["BN"]))
        y.copy_(reference.int6_linear(x, *planes, bias, 128, activation))

    monkeypatch.delenv("LINCOMPILE_KERNEL_CHECK", raising=False)
    monkeypatch.setattr(first_use, "_KNOWN", {})
    monkeypatch.setattr(kernels, "narrow", narrow)
    for rows in (600, 9000, 9001, 700):
        codes = torch.randint(-32, 32, (rows, 128), dtype=torch.int8)
        planes = (*pack.pack(codes), torch.ones(rows, 1, dtype=torch.float16))
        kernels.int6_linear(torch.randn(1, 128), *planes, None, 128, "a8")
    cut = first_use.TOKENS
    assert ran == [(cut, 4), (600, 4), (cut, 32), (9000, 32), (9001, 32), (cut, 8), (700, 8)]


@pytest.mark.parametrize("broken", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["int6_linear", "int6_layer"])
def test_one_tokens_ways_are_tried_in_turn(form: str, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gluon's kernel, Triton's of the same work, the one that has its token quantized for it, the definition."""
    pytest.importorskip("triton", reason="Triton isn't installed")
    from lincompile.kernels import first_use
    from lincompile.kernels.int6_linear import triton as kernels

    ran: list[str] = []

    def launcher(name: str) -> Any:
        def launch(
            x: Tensor, planes: Any, bias: Any, y: Tensor, activation: str, config: Any, around: Any = kernels.ALONE
        ) -> None:
            way = name if name == "vector" else {True: "gluon", False: "triton"}[config["GLUON"]]
            ran.append(way)
            more, norm = around.residual, around.norm_weight
            want = layer.plain(x, norm, around.epsilon, around.gated, more, *planes, bias, 128, activation)
            y.copy_(want + 1000 * (["gluon", "triton", "vector"].index(way) < broken))

        launch.__name__ = name
        return launch

    monkeypatch.delenv("LINCOMPILE_KERNEL_CHECK", raising=False)
    monkeypatch.setattr(first_use, "_KNOWN", {})
    monkeypatch.setattr(kernels, "hopper", lambda device: True)
    monkeypatch.setattr(kernels, "narrow", launcher("narrow"))
    monkeypatch.setattr(kernels, "vector", launcher("vector"))
    planes = (*pack.pack(torch.randint(-32, 32, (40, 128), dtype=torch.int8)), torch.ones(40, 1, dtype=torch.float16))
    x, norm, more = torch.randn(1, 128), torch.rand(128), torch.randn(1, 40)

    def call() -> Tensor | None:
        if form == "int6_linear":
            return kernels.int6_linear(x, *planes, None, 128, "a8")
        return kernels.int6_layer(x, norm, 1e-6, False, more, *planes, None, "a8")

    wanted = (None, 0.0, False, None) if form == "int6_linear" else (norm, 1e-6, False, more)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = call()
    expected = None if form == "int6_layer" and broken == 3 else layer.plain(x, *wanted, *planes, None, 128, "a8")
    torch.testing.assert_close(y, expected)
    assert [str(warning.message).split("(")[1].split(",")[0].split(" num")[0] for warning in said] == [
        "narrow GLUON=True BN=4 GB=2", "narrow GLUON=False BN=4 GB=2", "vector BN=2 HALVES=64",
    ][:broken]  # fmt: skip
    assert list(dict.fromkeys(ran)) == ["gluon", "triton", "vector"][: broken + 1]
    ran.clear()
    torch.testing.assert_close(call(), expected)
    assert ran == ["gluon", "triton", "vector"][broken : broken + 1], "what was wrong once isn't tried again"


def test_which_kernels_take_one_token_and_with_which_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton isn't installed")
    from lincompile.kernels.int6_linear import tiles as rules
    from lincompile.kernels.int6_linear import triton as kernels

    def found(width: int, rows: int) -> list[tuple[str, Any]]:
        launchers: list[Any] = kernels.one_token(width, rows, torch.device("cpu"))
        return [(each.func.__name__, each.keywords["config"]) for each in launchers]

    narrow, vector = rules.narrow_config, rules.vector_config
    assert found(2064, 9) == [("vector", vector(2064))]
    assert found(2048, 9) == [("narrow", narrow(16, 9, False)), ("vector", vector(2048))]
    assert found(2048, 9)[0][1] is found(2048, 9)[0][1], "tiles are made once"
    monkeypatch.setattr(kernels, "hopper", lambda device: True)
    assert [config.get("WALKS") for _, config in found(576, 8192)] == [None] * 3
    assert [config.get("WALKS") for _, config in found(576, 8193)] == [4, None, None]
    assert [config["BN"] for _, config in found(576, 49152)] == [32, 32, 2]
    assert [config.get("GLUON") for _, config in found(2048, 9)] == [True, False, None]
    assert [config.get("GLUON") for _, config in found(2064, 9)] == [None]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 8, 13, 32, 50, 64])
def test_the_gluon_kernel_is_exact_over_poisoned_memory(tokens: int) -> None:
    from lincompile.kernels.int6_linear import tiles as rules
    from lincompile.kernels.int6_linear import triton as kernels

    device = torch.device("cuda")
    if not kernels.hopper(device):
        pytest.skip("the Gluon kernel is for Hopper")
    for rows, width in ((70, 512), (512, 1152), (257, 256), (130, 9088)):
        poison = torch.full((1 << 24,), float("nan"), device=device)  # whatever is allocated next starts as NaN
        del poison
        codes, scale, x, bias, expected = exact_case(tokens, rows, width)
        planes = (*(p.cuda() for p in pack.pack(codes)), scale.cuda())
        y = torch.full((tokens, rows), float("nan"), device=device)
        kernels.few(x.cuda(), planes, bias.cuda(), y, "a8", rules.few_config(tokens, rows, width))
        assert torch.equal(y.cpu().double(), expected.float().double()), (rows, width)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 16, 17, 50, 64, 130])
def test_few_tokens_of_eight_bit_weights_are_exact_over_poisoned_memory(tokens: int) -> None:
    from lincompile.kernels.int6_linear import tiles as rules
    from lincompile.kernels.int6_linear import triton as kernels

    device = torch.device("cuda")
    for rows, width in ((70, 512), (512, 1152), (257, 208), (130, 9088), (64, 16)):
        codes, scale, x, bias, expected = (t.to(device) for t in exact_case(tokens, rows, width, 8))
        config = rules.few_bytes_config(tokens, rows, width)
        for dtype in (torch.float32, torch.bfloat16):
            if not torch.equal(x.to(dtype).float(), x):
                continue
            poison = torch.full((1 << 24,), float("nan"), device=device)  # whatever is allocated next starts as NaN
            del poison
            y = torch.full((tokens, rows), float("nan"), dtype=dtype, device=device)
            kernels.few_bytes(x.to(dtype), (codes, scale), bias.to(dtype), y, "a8", config)
            assert torch.equal(y, expected.float().to(dtype)), (rows, width, dtype)
        x[-1, -1] = float("nan")
        kernels.few_bytes(x, (codes, scale), None, y := torch.empty(tokens, rows, device=device), "a8", config)
        assert bool(y[-1].isnan().all()) and torch.equal(y[:-1], (expected - bias).float()[:-1])


def exact_case(tokens: int, rows: int, width: int, bits: int = 6) -> tuple[Tensor, ...]:
    """Integer codes, scales that are powers of two, inputs that are quantized exactly, a bias, and the outputs."""
    most = 2 ** (bits - 1)
    codes = torch.randint(1 - most if bits == 8 else -most, most, (rows, width), dtype=torch.int8)
    groups = pack.group_count(width, 128)
    scale = torch.randint(0, 3, (rows, groups)).exp2()
    x = torch.randint(-127, 128, (tokens, width)).float()
    x[:, ::16] = 127
    x *= torch.randint(0, 3, (tokens, groups)).exp2().repeat_interleave(128, 1)[:, :width]
    bias = torch.randint(-9, 9, (rows,)).float()
    expected = x.double() @ (codes.double() * scale.repeat_interleave(128, 1)[:, :width]).t() + bias.double()
    return codes, scale.half(), x, bias, expected


# Less than a tile of tokens and of rows, tiles cut off at both ends, partial groups, more tiles than multiprocessors;
# the last three have rows that TMA can't write in place in 16 or 32 bits.
PREFILL = [(300, 704, 640), (1, 580, 128), (900, 2000, 2048), (2049, 4352, 192), (517, 1036, 1168), (257, 130, 1040),
           (140, 33, 16)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize(("tokens", "rows", "width"), PREFILL)
def test_prefill_is_exact_over_poisoned_memory(tokens: int, rows: int, width: int, bits: int) -> None:
    from lincompile.kernels.int6_linear import triton as kernels

    device = torch.device("cuda")
    if not kernels.hopper(device):
        pytest.skip("the Gluon kernel is for Hopper")
    codes, scale, x, bias, expected = exact_case(tokens, rows, width, bits)
    weights = [t.cuda() for t in (*(pack.pack(codes) if bits == 6 else (codes,)), scale)]
    launch = kernels.prefill if bits == 6 else kernels.prefill_bytes
    x, bias, expected = x.cuda(), bias.cuda(), expected.cuda()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if not torch.equal(x.to(dtype).float(), x):
            continue
        poison = torch.full((1 << 24,), float("nan"), device=device)  # whatever is allocated next starts as NaN
        del poison
        y = torch.full((tokens, rows), float("nan"), dtype=dtype, device=device)
        launch(x.to(dtype), weights, bias.to(dtype), y, "a8")
        assert torch.equal(y, expected.float().to(dtype)), dtype
    launch(x, weights, None, y := torch.empty(tokens, rows, device=device), "a8")
    assert torch.equal(y, (expected - bias).float())
    x[-1, -1] = float("nan")
    launch(x, weights, None, y, "a8")
    assert bool(y[-1].isnan().all()) and torch.equal(y[:-1], (expected - bias).float()[:-1])


@pytest.mark.gpu
def test_prefill_serves_what_fills_the_chip_and_is_recorded() -> None:
    from lincompile.kernels.int6_linear import triton as kernels

    if not kernels.hopper(torch.device("cuda")):
        pytest.skip("the Gluon kernel is for Hopper")
    codes, scale, x, bias, expected = exact_case(1100, 6144, 640)
    (hi, lo), scale, x, bias, expected = pack.pack(codes), scale.cuda(), x.cuda(), bias.cuda(), expected.cuda()
    planes = hi.cuda(), lo.cuda(), scale
    assert [launch.__name__ for launch in kernels.ways(x, planes, True)] == ["prefill", "large"]
    y = torch.ops.lincompile.int6_linear(x, *planes, bias, 128, "a8")
    assert torch.equal(y, expected.float())
    batched = x.view(2, 550, 640), expected.float().view(2, 550, -1)
    assert torch.equal(torch.ops.lincompile.int6_linear(batched[0], *planes, bias, 128, "a8"), batched[1])
    assert torch.equal(torch.ops.lincompile.int8_linear(batched[0], codes.cuda(), scale, bias, 128, "a8"), batched[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.lincompile.int6_linear(x, *planes, bias, 128, "a8")
    x.copy_(x.flip(0))
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected.float().flip(0))


def test_launchers_get_tokens_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and outputs ``[M, ·]``, whatever axes a call's tokens lie on."""
    from lincompile.kernels.int6_linear import triton as kernels

    codes, scale = q.quantize_weight(torch.randn(40, 64))
    planes, x = (*pack.pack(codes), scale), torch.randn(2, 150, 64)

    def launch(x: Tensor, planes: Any, bias: Tensor | None, y: Tensor, activation: str) -> None:
        (tokens, width), (same, rows) = x.shape, y.shape
        assert (tokens, width, same, rows) == (300, 64, 300, 40)
        y.copy_(reference.int6_linear(x, *planes, bias, 128, activation))

    monkeypatch.setenv("LINCOMPILE_KERNEL_CHECK", "0")
    monkeypatch.setattr(kernels, "large", launch)
    y = kernels.int6_linear(x, *planes, None)
    assert torch.equal(y, reference.int6_linear(x, *planes, None, 128, "a8")) and y.shape == (2, 150, 40)


def test_ways_of_copied_weights_are_compared_by_themselves() -> None:
    """Kernels that may not read them early are other code."""
    from lincompile.kernels.int6_linear import triton as kernels

    planes = torch.empty(9, 2048), torch.empty(9, 1024), torch.empty(9, 32)
    names = [
        [kernels._called(launch) for launch in kernels.ways(torch.empty(1, 4096), planes, early)]
        for early in (True, False)
    ]
    assert names[1] == [f"{name} of copies" for name in names[0]]


def test_which_calls_fill_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but Hopper runs the kernel, and two in three of its multiprocessors must have a tile."""
    from lincompile.kernels.int6_linear import triton as kernels

    device = torch.device("cpu")
    assert not kernels.fills(4096, 28672, device)
    monkeypatch.setattr(kernels, "hopper", lambda device: True)
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    served = [(4096, 28672), (1024, 4096), (705, 4096), (704, 3840), (257, 28672)]
    left = [(512, 4096), (300, 128), (256, 28672), (1, 128256)]
    assert [kernels.fills(tokens, rows, device) for tokens, rows in served + left] == [True] * 5 + [False] * 4
    planes = torch.empty(28672, 4), torch.empty(28672, 2), torch.empty(28672, 1)
    found = {n: [launch.__name__ for launch in kernels.ways(torch.empty(n, 8), planes, True)] for n in (257, 300)}
    assert found == {257: ["prefill", "large"], 300: ["prefill", "large"]}
    assert [
        launch.__name__ for launch in kernels.ways(torch.empty(300, 8), (planes[0], planes[1], torch.empty(9, 1)), True)
    ] == ["large"]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["a8", "a6"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 31, 64, 65, 257])
@pytest.mark.parametrize(("rows", "width"), [(70, 576), (200, 1024), (64, 2064), (33, 176)])
def test_gpu_kernels_are_exact_in_the_integer_part(rows: int, width: int, tokens: int, activation: str) -> None:
    """Scales of 1 make every float32 sum exact, so nothing may differ from the integer product."""
    codes = torch.randint(-32, 32, (rows, width), dtype=torch.int8)
    planes = [plane.cuda() for plane in pack.pack(codes)]
    scale = torch.ones(rows, pack.group_count(width, 128), dtype=torch.float16, device="cuda")
    levels = q.LEVELS[int(activation[1:])]
    x = torch.randint(-levels, levels + 1, (tokens, width)).float()
    x[:, ::16] = levels
    bias = torch.randint(-9, 9, (rows,)).float()
    got = torch.ops.lincompile.int6_linear(x.cuda(), *planes, scale, bias.cuda(), 128, activation)
    assert torch.equal(got.cpu().double(), x.double() @ codes.double().t() + bias.double())


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["a8", "a6"])
@pytest.mark.parametrize("gluon", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(70, 576), (1537, 1536), (64, 2048), (33, 176), (9, 128), (49152, 576), (9001, 2048), (8200, 128)],
)
def test_narrow_kernels_are_exact_in_the_integer_part(rows: int, width: int, gluon: bool, activation: str) -> None:
    from lincompile.kernels.int6_linear import tiles as rules
    from lincompile.kernels.int6_linear import triton as kernels

    if gluon and not kernels.hopper(torch.device("cuda")):
        pytest.skip("the Gluon kernel is for Hopper")
    codes = torch.randint(-32, 32, (rows, width), dtype=torch.int8)
    scale = torch.ones(rows, pack.group_count(width, 128), dtype=torch.float16)
    planes = (*(plane.cuda() for plane in pack.pack(codes)), scale.cuda())
    levels = q.LEVELS[int(activation[1:])]
    x = torch.randint(-levels, levels + 1, (1, width)).float()
    x[:, ::16] = levels
    y, bias = torch.full((1, rows), float("nan"), device="cuda"), torch.randint(-9, 9, (rows,)).float()
    config = rules.narrow_config(scale.shape[1], rows, gluon)
    kernels.narrow(x.cuda(), planes, bias.cuda(), y, activation, config)
    assert torch.equal(y.cpu().double(), x.double() @ codes.double().t() + bias.double())


@pytest.mark.gpu
@pytest.mark.parametrize("width", [384, 336, 576])
@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_gpu_int8_linear_is_exact_in_the_integer_part(tokens: int, width: int) -> None:
    codes = torch.randint(-127, 128, (70, width), dtype=torch.int8)
    x = torch.randint(-127, 128, (tokens, width)).float()
    x[:, ::16] = 127
    scale = torch.ones(70, pack.group_count(width, 128), dtype=torch.float16).cuda()
    got = torch.ops.lincompile.int8_linear(x.cuda(), codes.cuda(), scale, None, 128, "a8")
    assert torch.equal(got.cpu().double(), x.double() @ codes.double().t())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize("tokens", [1, 5, 33, 700])
def test_gpu_kernels_equal_the_definition_and_survive_graphs(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    codes, scale = q.quantize_weight(torch.randn(192, 576))
    planes = [t.cuda() for t in (*pack.pack(codes), scale)]
    x = torch.randn(tokens, 576, dtype=dtype, device="cuda")
    bias = torch.randn(192, dtype=dtype, device="cuda")
    expected = reference.int6_linear_definition(x, *planes, bias, 128, "a8")

    def error(y: torch.Tensor) -> float:
        return float((y.double() - expected).norm() / expected.norm())

    assert error(torch.ops.lincompile.int6_linear(x, *planes, bias, 128, "a8")) < tolerance
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.lincompile.int6_linear(x, *planes, bias, 128, "a8")
    y.fill_(float("nan"))
    graph.replay()
    assert error(y) < tolerance
