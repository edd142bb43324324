"""int6_linear on one NVIDIA GPU: exactness first, then speed against cuBLAS bf16, torch._int_mm, torchao and humming.

    python benchmarks/int6_linear.py --out benchmarks/results/int6_linear.json [--sweep] [--peers]

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
import triton
from torch import Tensor

from lincompile.kernels import ops  # noqa: F401  registers torch.ops.lincompile
from lincompile.kernels.int6_linear import codes as q
from lincompile.kernels.int6_linear import pack, reference
from lincompile.kernels.int6_linear import triton as kernels

DECODE = [(28672, 8192), (8192, 28672), (4096, 4096)]
MUST = {(28672, 8192, 1): 2.0, (8192, 28672, 1): 2.0, (28672, 8192, 16): 1.8, (28672, 8192, 32): 1.8,
        (8192, 28672, 16): 1.8, (8192, 28672, 32): 1.8, (4096, 4096, 1): 1.4, (28672, 8192, 4096): 1.15}  # fmt: skip
VECTOR = [(1, 64, 2), (1, 128, 4), (2, 64, 2), (2, 64, 4), (2, 128, 4), (4, 64, 2), (4, 64, 4), (4, 128, 4), (8, 64, 4)]
SMALL = [
    (32, 1, 4, 1),
    (32, 2, 3, 1),
    (32, 2, 4, 1),
    (32, 2, 4, 2),
    (32, 2, 4, 4),
    (64, 2, 3, 2),
    (64, 4, 3, 4),
    (128, 4, 3, 2),
]
LARGE = [(128, 64, 4, 3), (128, 64, 4, 4), (64, 128, 4, 3), (64, 64, 4, 4), (128, 128, 8, 3), (128, 32, 4, 4)]
PAST_L2 = 320 << 20  # bytes of weights in one replay, at least


def random_planes(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed random weights, made on the GPU (every byte pattern is a valid plane)."""
    hi, lo = (torch.randint(0, 256, (rows, n), dtype=torch.uint8, device="cuda") for n in pack.plane_bytes(width))
    scale = torch.rand(rows, pack.group_count(width, 128), device="cuda") * 0.002 + 0.001
    return hi, lo, scale.half()


def check_exact() -> list[dict[str, Any]]:
    """Bit for bit where float32 holds every sum: integer activations of scale 1, power-of-two weight scales."""
    results = []
    cases = [((rows, width), m) for rows, width in ((70, 576), (200, 1024)) for m in (1, 2, 16, 31, 64, 65, 257, 300)]
    for (rows, width), tokens in [*cases, ((64, 2064), 1), ((64, 2064), 31)]:
        weight = torch.randint(-32, 32, (rows, width), dtype=torch.int8)
        hi, lo = (plane.cuda() for plane in pack.pack(weight))
        groups = pack.group_count(width, 128)
        scale = torch.ones(rows, groups, dtype=torch.float16, device="cuda")
        for activation, levels in (("a8", 127), ("a6", 31)):
            x = torch.randint(-levels, levels + 1, (tokens, width)).float()
            x[:, ::16] = levels  # the largest code occurs in every group, so the scale is exactly 1
            bias = torch.randint(-9, 9, (rows,)).float()
            expected = (x.double() @ weight.double().t() + bias.double()).cuda()
            got = torch.ops.lincompile.int6_linear(x.cuda(), hi, lo, scale, bias.cuda(), 128, activation)
            assert torch.equal(got.double(), expected), (rows, width, tokens, activation)
        results.append({"rows": rows, "width": width, "tokens": tokens, "exact": True})
    return results


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


def median_us(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Median microseconds of one call: the calls are captured in one graph and replayed in turn."""
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
    return max(2, min(64, -(-PAST_L2 // bytes_each)))


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

    config = {"int8": quantization.Int8DynamicActivationInt8WeightConfig, "int4": quantization.Int4WeightOnlyConfig}[
        kind
    ]
    layers = []
    for _ in range(copies_for(rows * width // (1 if kind == "int8" else 2))):
        layer = torch.nn.Sequential(torch.nn.Linear(width, rows, bias=False, device="cuda", dtype=torch.bfloat16))
        quantization.quantize_(layer, config())
        layers.append(layer)
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
    "torchao_int8": lambda rows, width, tokens: torchao_us(rows, width, tokens, "int8"),
    "torchao_int4": lambda rows, width, tokens: torchao_us(rows, width, tokens, "int4"),
    "humming_w6a16": lambda rows, width, tokens: humming_us(rows, width, tokens, "a16"),
    "humming_w6a8": lambda rows, width, tokens: humming_us(rows, width, tokens, "a8"),
}


def peer_us(name: str, rows: int, width: int, tokens: int) -> float:
    """A peer's time, measured in a process of its own: a failed graph capture spoils the process for everyone."""
    command = [sys.executable, __file__, "--peer", f"{name}:{rows}:{width}:{tokens}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output")
    return float(done.stdout.split()[-1])


def sweep() -> dict[str, Any]:
    """Other tile shapes of each path."""
    found: dict[str, Any] = {}
    for (rows, width), (block, halves, warps) in itertools.product(DECODE, VECTOR):
        config = {"BN": block, "HALVES": halves, "num_warps": warps}
        attempt(found, f"vector {rows}x{width} {block}/{halves}/{warps}",
                lambda c=config, r=rows, w=width: int6_us(r, w, 1, "vector", c))  # type: ignore[misc]  # fmt: skip
    for (rows, width), tokens, (block, warps, stages, split) in itertools.product(DECODE[:2], (16, 32), SMALL):
        config = {"BM": tokens, "BN": block, "STAGES": stages, "SPLIT": split, "num_warps": warps}
        attempt(found, f"small {rows}x{width} M={tokens} {block}/{warps}/{stages}/{split}",
                lambda c=config, r=rows, w=width, t=tokens: int6_us(r, w, t, "small", c))  # type: ignore[misc]  # fmt: skip
    for block_m, block_n, warps, stages in LARGE:
        config = {"BM": block_m, "BN": block_n, "STAGES": stages, "BAND": 8, "num_warps": warps}
        attempt(found, f"large {block_m}x{block_n}/{warps}/{stages}",
                lambda c=config: int6_us(28672, 8192, 4096, "large", c))  # type: ignore[misc]  # fmt: skip
    return found


def table(peers: bool) -> list[dict[str, Any]]:
    rows_out = []
    cases = [(n, k, m) for n, k in DECODE[:2] for m in (1, 16, 32)] + [(4096, 4096, 1), (28672, 8192, 4096)]
    for rows, width, tokens in cases:
        record: dict[str, Any] = {"N": rows, "K": width, "M": tokens, "must": MUST.get((rows, width, tokens))}
        attempt(record, "cublas_bf16", lambda: cublas_us(rows, width, tokens))  # noqa: B023
        attempt(record, "int6", lambda: int6_us(rows, width, tokens))  # noqa: B023
        attempt(record, "int_mm", lambda: int_mm_us(rows, width, tokens))  # noqa: B023
        if peers:
            for name in PEERS:
                attempt(record, name, lambda: peer_us(name, rows, width, tokens))  # noqa: B023
        if isinstance(record["int6"], float) and isinstance(record["cublas_bf16"], float):
            record["speedup"] = round(record["cublas_bf16"] / record["int6"], 3)
            record["weight_gb_per_s"] = round(rows * width * 0.765625 / record["int6"] / 1e3, 1)
        print(json.dumps(record), flush=True)
        rows_out.append(record)
    return rows_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("int6_linear.json"))
    parser.add_argument("--sweep", action="store_true", help="also time other tile shapes")
    parser.add_argument("--peers", action="store_true", help="also time torchao and humming-kernels")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.peer:
        name, *sizes = arguments.peer.split(":")
        with torch.no_grad():
            print(PEERS[name](*map(int, sizes)))
        return
    started = time.time()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "exact": check_exact(), "random": check_random(),
    }  # fmt: skip
    worst = max(item["error"] for item in result["random"] if item["dtype"] == "float32")
    print(
        f"exact in {len(result['exact'])} cases; worst float32 error {worst:.2e}; {time.time() - started:.0f} s",
        flush=True,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result["table"] = table(arguments.peers)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.sweep:
        result["sweep"] = sweep()
        print(json.dumps(result["sweep"], indent=0))
    result["seconds"] = round(time.time() - started, 1)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
