"""int6_linear on one NVIDIA GPU: exactness first, then speed against cuBLAS bf16, torch._int_mm, torchao and humming.

    python benchmarks/int6_linear.py --out benchmarks/results/int6_linear.json [--variants] [--peers]

``--variants`` times the tiles of the Gluon kernel for a few tokens (``int6_tiles.py`` those of the others), ``--peers``
other libraries (humming's kernels are compiled beside the checks). The file is written after each part; the table comes
last and counts, for each shape, the fastest of what was timed. ``--shapes NxKxM,…`` times others than the table's.

Times are medians over replays of a CUDA graph that walks through copies of the weights, together larger than any cache,
so every weight comes from device memory. Activation quantization is part of the int6 and int8 times, except for
``torch._int_mm``, which is the bare integer product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from versions import versions

from lincompile.kernels import ops  # noqa: F401  registers torch.ops.lincompile
from lincompile.kernels.int6_linear import codes as q
from lincompile.kernels.int6_linear import pack, reference
from lincompile.kernels.int6_linear import tiles as rules
from lincompile.kernels.int6_linear import triton as kernels

DECODE = [(28672, 8192), (8192, 28672), (4096, 4096)]
MUST = {(28672, 8192, 1): 2.0, (8192, 28672, 1): 2.0, (28672, 8192, 16): 1.8, (28672, 8192, 32): 1.8,
        (8192, 28672, 16): 1.8, (8192, 28672, 32): 1.8, (4096, 4096, 1): 1.4, (28672, 8192, 4096): 1.15}  # fmt: skip
# Tiles of the Gluon kernel for a few tokens: (ROWS, WARPS, STAGES).
TILES = [(2, 4, 3), (1, 8, 3), (1, 4, 4), (2, 4, 2)]
PAST_L2 = 320 << 20  # bytes of weights in one replay, at least
WARM = {"on": False}  # one call of each kind, not timed


def random_planes(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed random weights, made on the GPU (every byte pattern is a valid plane)."""
    hi, lo = (torch.randint(0, 256, (rows, n), dtype=torch.uint8, device="cuda") for n in pack.plane_bytes(width))
    scale = torch.rand(rows, pack.group_count(width, 128), device="cuda") * 0.002 + 0.001
    return hi, lo, scale.half()


def check_exact() -> list[dict[str, Any]]:
    """Bit for bit where float32 holds every sum: integer activations of scale 1, power-of-two weight scales."""
    results = []
    cases = [((rows, width), m) for rows, width in ((70, 576), (200, 1024)) for m in (1, 2, 16, 31, 64, 65, 257, 300)]
    full = [((3100, 576), 1100), ((6140, 1024), 1000)]  # as many tiles as fill the chip
    for (rows, width), tokens in [*cases, *full, ((64, 2064), 1), ((64, 2064), 31)]:
        weight = torch.randint(-32, 32, (rows, width), dtype=torch.int8)
        hi, lo = (plane.cuda() for plane in pack.pack(weight))
        groups = pack.group_count(width, 128)
        scale = torch.ones(rows, groups, dtype=torch.float16, device="cuda")
        for activation, levels in (("a8", 127), ("a6", 31)):
            x = torch.randint(-levels, levels + 1, (tokens, width)).float()
            x[:, ::16] = levels  # the largest code occurs in every group, so the scale is exactly 1
            bias = torch.randint(-9, 9, (rows,)).float()
            expected = x.cuda().double() @ weight.cuda().double().t() + bias.cuda().double()
            got = torch.ops.lincompile.int6_linear(x.cuda(), hi, lo, scale, bias.cuda(), 128, activation)
            assert torch.equal(got.double(), expected), (rows, width, tokens, activation)
        results.append({"rows": rows, "width": width, "tokens": tokens, "exact": True})
    return results


def poisoned(tokens: int, rows: int) -> Tensor:
    """Output memory full of NaN, after the allocator's free memory has been filled with NaN too."""
    spoilt = torch.full((1 << 25,), float("nan"), device="cuda")
    del spoilt
    return torch.full((tokens, rows), float("nan"), device="cuda")


def few_options(tokens: int, rows: int, width: int, tile: tuple[int, ...]) -> dict[str, int]:
    per_warp, warps, stages = tile
    programs = -(-rows // (16 * per_warp * warps))
    changed = {"ROWS": per_warp, "WARPS": warps, "STAGES": stages, "SHARES": max(1, 264 // programs)}
    return {**rules.few_config(tokens, rows, width), **changed}


def check_variants() -> dict[str, Any]:
    """Every tile over poisoned memory, bit for bit as in :func:`check_exact`; a wrong one isn't timed."""
    verdicts: dict[str, Any] = {}
    for tokens, tile in itertools.product((3, 16, 29, 70), TILES):
        name = f"few {'/'.join(map(str, tile))}"
        try:
            for rows, width in ((257, 1152), (512, 2048), (130, 9088)):
                codes = torch.randint(-32, 32, (rows, width), dtype=torch.int8)
                hi, lo = (plane.cuda() for plane in pack.pack(codes))
                # Powers of two, so that every scale counts and sums stay exact.
                scale = torch.randint(0, 3, (rows, width // 128)).exp2()
                x = torch.randint(-127, 128, (tokens, width)).float()
                x[:, ::16] = 127
                spread = torch.randint(0, 3, (tokens, width // 128)).exp2().repeat_interleave(128, 1)
                bias, y = torch.randint(-9, 9, (rows,)).float(), poisoned(tokens, rows)
                planes = hi, lo, scale.half().cuda()
                kernels.few((x * spread).cuda(), planes, bias.cuda(), y, "a8", few_options(tokens, rows, width, tile))
                weight = codes.double() * scale.repeat_interleave(128, 1)
                expected = (x * spread).double() @ weight.t() + bias.double()
                wrong = int((y.cpu().double() != expected.float().double()).sum())
                if wrong:
                    verdicts[name] = f"WRONG for M={tokens} {rows}x{width}: {wrong} values differ"
            verdicts.setdefault(name, "exact")
        except Exception as error:
            verdicts[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return verdicts


def measure_variants() -> None:
    """Prints one JSON line per timed tile; runs in a process of its own, which may fail or hang alone."""
    verdicts = check_variants()
    print("CHILD", json.dumps({"shape": "exact"} | verdicts), flush=True)

    def timed(rows: int, width: int, tokens: int, name: str, options: dict[str, int] | None) -> None:
        record: dict[str, Any] = {}
        if verdicts.get(name, "exact") == "exact":
            attempt(record, name, lambda: int6_us(rows, width, tokens, name.split()[0], options))
            print("CHILD", json.dumps({"shape": f"{rows}x{width} M={tokens}"} | record), flush=True)

    more = [(28672, 8192, 2), (28672, 8192, 64), (4096, 4096, 16), (4096, 4096, 32)]
    for rows, width, tokens in [*((*shape, tokens) for shape in DECODE[:2] for tokens in (16, 32)), *more]:
        for tile in TILES:
            name = f"few {'/'.join(map(str, tile))}"
            timed(rows, width, tokens, name, few_options(tokens, rows, width, tile))
        timed(rows, width, tokens, "small", None)


def child(arguments: list[str], seconds: float) -> tuple[dict[str, dict[str, Any]], str]:
    """Results by shape of this script run in a process of its own, and why it ended early if it did."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        text, error = done.stdout, (done.stderr.strip().splitlines()[-1:] or ["no message"]) if done.returncode else []
    except subprocess.TimeoutExpired as expired:
        text = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        error = [f"stopped after {seconds:.0f} s"]
    found: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith("CHILD "):
            record = json.loads(line[6:])
            found.setdefault(record.pop("shape"), {}).update(record)
    print(*arguments, "->", len(found), "shapes", *error, flush=True)
    return found, error[0][:200] if error else ""


def check_random() -> list[dict[str, Any]]:
    """Against the float64 definition, on real-valued inputs, in every dtype."""
    results = []
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
    cases = [((rows, width), m) for rows, width in ((192, 576), (256, 4096)) for m in (1, 5, 33, 128, 700)]
    for (rows, width), tokens in cases:
        dtype = {1: torch.float16, 33: torch.float32}.get(tokens, torch.bfloat16)
        weight = torch.randn(rows, width)
        codes, scale = q.quantize_weight(weight)
        buffers = [t.cuda() for t in (*pack.pack(codes), scale)]
        x = (torch.randn(tokens, width) * torch.rand(tokens, 1) * 8).to(dtype).cuda()
        bias = torch.randn(rows, dtype=dtype).cuda()
        for activation in ("a8", "a6"):
            got = torch.ops.lincompile.int6_linear(x, *buffers, bias, 128, activation).double()
            expected = reference.int6_linear_definition(x, *buffers, bias, 128, activation)
            error = float((got - expected).norm() / expected.norm())
            assert error < tolerance[dtype], (rows, width, tokens, dtype, activation, error)
            results.append({"rows": rows, "width": width, "tokens": tokens, "dtype": str(dtype)[6:],
                            "activation": activation, "error": error})  # fmt: skip
    x = torch.randn(3, 576, device="cuda")
    x[1, 300] = float("nan")
    codes, scale = q.quantize_weight(torch.randn(64, 576))
    y = torch.ops.lincompile.int6_linear(x, *(t.cuda() for t in (*pack.pack(codes), scale)), None, 128, "a8")
    assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())
    return results


def check_int8() -> dict[str, Any]:
    """int8_linear's kernel against the float64 definition."""
    errors: dict[str, float] = {}
    cases = [*itertools.product(((300, 1024), (256, 4096), (192, 576)), (1, 5, 60, 300)), ((3100, 576), 1100)]
    for (rows, width), tokens in cases:
        codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
        scale = (torch.rand(rows, pack.group_count(width, 128), device="cuda") * 0.01 + 0.001).half()
        x = (torch.randn(tokens, width, device="cuda") * 4).to(torch.bfloat16)
        bias = torch.randn(rows, device="cuda")
        poisoned(tokens, rows)
        got = kernels.int8_linear(x, codes, scale, bias, 128, "a8").double()
        expected = reference.int8_linear_definition(x, codes, scale, bias, 128, "a8")
        errors[f"{rows}x{width} M={tokens}"] = float((got - expected).norm() / expected.norm())
    return {"errors": errors, "ok": max(errors.values()) < 4e-3}


def median_us(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Median microseconds of one call: the calls are captured in one graph and replayed in turn."""
    if WARM["on"]:
        calls[0]()
        return 0.0
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for index in range(replays + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(stop) * 1000 / len(calls))
    return statistics.median(times)


def copies_for(bytes_each: int) -> int:
    return 1 if WARM["on"] else max(2, min(64, -(-PAST_L2 // bytes_each)))


def int6_us(rows: int, width: int, tokens: int, path: str | None = None, config: dict[str, int] | None = None) -> float:
    """The public op, or (for sweeps) one path with a configuration."""
    planes = [random_planes(rows, width) for _ in range(copies_for(rows * width * 3 // 4))]
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)

    def call(p: tuple[Tensor, Tensor, Tensor]) -> None:
        if path is None:
            torch.ops.lincompile.int6_linear(x, *p, None, 128, "a8")
            return
        getattr(kernels, path)(x, p, None, y, "a8", config)

    return median_us([lambda p=p: call(p) for p in planes])  # type: ignore[misc]


def int8_us(rows: int, width: int, tokens: int, config: dict[str, int] | None = None) -> float:
    """The public op of eight-bit weights, or (for sweeps) its kernel of one or few tokens with a configuration."""
    stored = []
    for _ in range(copies_for(rows * width)):
        scale = (torch.rand(rows, pack.group_count(width, 128), device="cuda") * 0.01 + 0.001).half()
        stored.append((torch.randint(-127, 128, (rows, width), device="cuda", dtype=torch.int8), scale))
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)

    def call(weights: tuple[Tensor, Tensor]) -> None:
        if config is None:
            torch.ops.lincompile.int8_linear(x, *weights, None, 128, "a8")
            return
        (kernels.vector_bytes if tokens == 1 else kernels.few_bytes)(x, weights, None, y, "a8", config)

    return median_us([lambda w=w: call(w) for w in stored])  # type: ignore[misc]


def cublas_us(rows: int, width: int, tokens: int) -> float:
    weights = [
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies_for(rows * width * 2))
    ]
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    return median_us([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])  # type: ignore[misc]


def int_mm_us(rows: int, width: int, tokens: int) -> float:
    weights = [
        torch.randint(-127, 128, (rows, width), device="cuda", dtype=torch.int8)
        for _ in range(copies_for(rows * width))
    ]
    x = torch.randint(-127, 128, (max(tokens, 17), width), device="cuda", dtype=torch.int8)
    return median_us([lambda w=w: torch._int_mm(x, w.t()) for w in weights])  # type: ignore[misc]


def humming_us(rows: int, width: int, tokens: int, activation: str) -> float:
    from humming.layer import HummingLayer

    layers = []
    for _ in range(copies_for(rows * width * 3 // 4)):
        layer = HummingLayer(
            shape_n=rows, shape_k=width, weight_config={"dtype": "int6", "group_size": 128},
            input_config=None if activation == "a16" else {"dtype": "int8"}, torch_dtype=torch.bfloat16,
        ).cuda()  # fmt: skip
        layer.load_from_unquantized(torch.randn(rows, width, dtype=torch.bfloat16, device="cuda"))
        layer.transform()
        layers.append(layer)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    return median_us([lambda layer=layer: layer(x) for layer in layers])  # type: ignore[misc]


def torchao_us(rows: int, width: int, tokens: int, kind: str) -> float:
    from torchao import quantization

    # Compiled, as its documentation asks; int4 in the packing of PyTorch's own kernel.
    packing = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}
    config = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "int8_weights": quantization.Int8WeightOnlyConfig,
        "int4": lambda: quantization.Int4WeightOnlyConfig(**packing),
    }[kind]
    layers = []
    for _ in range(copies_for(rows * width // (2 if kind == "int4" else 1))):
        layer = torch.nn.Sequential(torch.nn.Linear(width, rows, bias=False, device="cuda", dtype=torch.bfloat16))
        quantization.quantize_(layer, config())
        layers.append(torch.compile(layer))
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    return median_us([lambda layer=layer: layer(x) for layer in layers])  # type: ignore[misc]


def attempt(record: dict[str, Any], name: str, measure: Callable[[], float]) -> None:
    """``record[name]`` becomes the time, or what went wrong."""
    try:
        with torch.no_grad():
            record[name] = round(measure(), 2)
    except Exception as error:
        record[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    torch.cuda.empty_cache()


PEERS: dict[str, Callable[[int, int, int], float]] = {
    "humming_w6a16": lambda rows, width, tokens: humming_us(rows, width, tokens, "a16"),
    "humming_w6a8": lambda rows, width, tokens: humming_us(rows, width, tokens, "a8"),
    "torchao_int8": lambda rows, width, tokens: torchao_us(rows, width, tokens, "int8"),
    "torchao_int4": lambda rows, width, tokens: torchao_us(rows, width, tokens, "int4"),
    "torchao_int8_weights": lambda rows, width, tokens: torchao_us(rows, width, tokens, "int8_weights"),
}
SHAPES = [(28672, 8192, 1), (8192, 28672, 1), (4096, 4096, 1), (28672, 8192, 16), (8192, 28672, 16), (28672, 8192, 32),
          (8192, 28672, 32), (28672, 8192, 4096)]  # fmt: skip
DRY = {"SHAPES": [(64, 256, 1), (64, 256, 16)], "PEER_SHAPES": [(64, 256, 1)], "PAST_L2": 1}

# For peers, whose time may end: one of each kind first.
PEER_SHAPES = sorted(SHAPES, key=lambda shape: [1, 16, 4096, 32].index(shape[2]) + 4 * (shape[:2] != (28672, 8192)))


def measure_peer(name: str) -> None:
    """Prints one JSON line per shape; runs in a process of its own, since a failed graph capture spoils it for all."""
    for rows, width, tokens in PEER_SHAPES:
        record: dict[str, Any] = {}
        attempt(record, name, lambda: PEERS[name](rows, width, tokens))  # noqa: B023
        print("CHILD", json.dumps({"shape": f"{rows}x{width} M={tokens}"} | record), flush=True)


def shapes(text: str) -> list[tuple[int, int, int]]:
    """``NxKxM,…`` as numbers."""
    found = []
    for part in text.split(","):
        rows, width, tokens = map(int, part.split("x"))
        if min(rows, width, tokens) < 1:
            raise ValueError(part)
        found.append((rows, width, tokens))
    return found


def warm_peer(name: str, told: list[str]) -> subprocess.Popen[bytes]:
    """A process that calls a peer once per shape, so that its kernels are compiled when it is timed. Humming's alone:
    it chooses tiles by rule, so nothing is tuned beside others' work."""
    command = [sys.executable, __file__, "--peer", name, "--warm", *told]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def table() -> list[dict[str, Any]]:
    """The ops as they dispatch today beside cuBLAS and the bare integer product."""
    rows_out = []
    for rows, width, tokens in SHAPES:
        record: dict[str, Any] = {"N": rows, "K": width, "M": tokens, "must": MUST.get((rows, width, tokens))}
        attempt(record, "cublas_bf16", lambda: cublas_us(rows, width, tokens))  # noqa: B023
        attempt(record, "int6", lambda: int6_us(rows, width, tokens))  # noqa: B023
        attempt(record, "w8a8", lambda: int8_us(rows, width, tokens))  # noqa: B023
        attempt(record, "int_mm", lambda: int_mm_us(rows, width, tokens))  # noqa: B023
        rows_out.append(record)
    return rows_out


def summarise(result: dict[str, Any]) -> None:
    """Adds to each row of the table the fastest variant, the peers, and the speed-ups; prints it."""
    for record in result["table"]:
        shape = f"{record['N']}x{record['K']} M={record['M']}"
        timed = {k: v for k, v in result.get("variants", {}).get(shape, {}).items() if isinstance(v, float)}
        if timed:
            record["best_variant"] = min(timed, key=lambda name: timed[name])
            record["best_us"] = timed[record["best_variant"]]
        record |= result.get("peers", {}).get(shape, {})
        times = [record[key] for key in ("int6", "best_us") if isinstance(record.get(key), float)]
        if times and isinstance(record["cublas_bf16"], float):
            record["speedup"] = round(record["cublas_bf16"] / min(times), 3)
            record["weight_gb_per_s"] = round(record["N"] * record["K"] * 0.765625 / min(times) / 1e3, 1)
        print(json.dumps(record), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("int6_linear.json"))
    parser.add_argument("--variants", action="store_true", help="also time the Gluon kernel's tiles")
    parser.add_argument("--peers", action="store_true", help="also time torchao and humming-kernels")
    parser.add_argument("--seconds", type=float, default=240, help="time for everything; the peers get what is left")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--variant", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", type=shapes, help="NxKxM,… instead of the table's; M tokens", metavar="NxKxM,…")
    parser.add_argument("--no-checks", dest="checks", action="store_false", help="times only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    WARM["on"] = arguments.warm
    told: list[str] = []
    if arguments.shapes:
        SHAPES[:] = PEER_SHAPES[:] = arguments.shapes
        told = ["--shapes", ",".join("x".join(map(str, shape)) for shape in SHAPES)]
    if arguments.peer or arguments.variant:
        measure_peer(arguments.peer) if arguments.peer else measure_variants()
        return 0
    started = time.time()
    result: dict[str, Any] = {"command": " ".join(["int6_linear.py", *sys.argv[1:]]), "versions": versions()}

    def part(name: str, measured: Any) -> None:
        result[name] = measured
        result["seconds"] = round(time.time() - started, 1)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {result['seconds']} s", flush=True)

    warming = [warm_peer(name, told) for name in PEERS if name.startswith("humming")] if arguments.peers else []
    for name, check in (("exact", check_exact), ("random", check_random), ("int8_linear", check_int8)):
        if arguments.checks:
            try:
                part(name, check())
            except Exception as error:
                part(name, {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"})
                print("WRONG", name, json.dumps(result[name]), flush=True)
    for process in warming:  # the GPU is idle when times are taken
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            result.setdefault("ended_early", {})["warming a peer"] = "stopped after 90 s"
    part("table", table())
    todo = [("variants", ["--variant"], 80.0)] if arguments.variants else []
    todo += [("peers", ["--peer", name, *told], 70.0) for name in PEERS if arguments.peers]
    for index, (name, options, most) in enumerate(todo):
        left = started + arguments.seconds - time.time()
        if left < 5:
            part("left_out", [" ".join(item[1]) for item in todo[index:]])
            break
        found, error = child(options, min(most, left))
        for shape, times in found.items():
            result.setdefault(name, {}).setdefault(shape, {}).update(times)
        if error:
            result.setdefault("ended_early", {})[" ".join(options)] = error
        part(name, result.get(name, {}))
        print(json.dumps(found), flush=True)
    summarise(result)
    part("table", result["table"])
    wrong = [name for name in ("exact", "random", "int8_linear") if isinstance(result.get(name), dict)]
    return 1 if any(not result[name]["ok"] for name in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
