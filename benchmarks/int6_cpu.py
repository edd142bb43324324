"""One token through a W6A8 layer on a CPU beside the float32 layer it replaces, runs in turn, on one thread.

    python benchmarks/int6_cpu.py --out benchmarks/results/int6_cpu.json

Times are microseconds: the median of each, and the median of the ratios of neighbouring runs, which other work on the
machine disturbs least. One layer in a loop comes from the cache where it fits, and the call itself (about 35 µs) shows;
``model`` walks through all linear layers of SmolLM2-135M in turn, as decoding does, so that weights come from memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lincompile.kernels import ops  # noqa: F401  registers torch.ops.lincompile
from lincompile.kernels.int6_linear import cpu, pack
from lincompile.kernels.int6_linear.codes import quantize_weight

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096), (14336, 4096)]


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@torch.no_grad()
def measure(rows: int, width: int, runs: int) -> dict[str, float | int]:
    weight, x = torch.randn(rows, width), torch.randn(1, width)
    codes, scale = quantize_weight(weight)
    planes = (*pack.pack(codes), scale)
    pairs = [
        (
            seconds(lambda: torch.nn.functional.linear(x, weight)),
            seconds(lambda: torch.ops.lincompile.int6_linear(x, *planes, None, 128, "a8")),
        )
        for _ in range(runs + 5)
    ][5:]
    return {
        "N": rows,
        "K": width,
        "float32_us": round(1e6 * statistics.median(plain for plain, _ in pairs), 1),
        "int6_us": round(1e6 * statistics.median(packed for _, packed in pairs), 1),
        "ratio": round(statistics.median(packed / plain for plain, packed in pairs), 3),
    }


@torch.no_grad()
def measure_model(runs: int, layers: int = 30) -> dict[str, float | int]:
    """Every linear layer of SmolLM2-135M once (weights of a layer are copies of the first's: speed is the same)."""
    plain, packed = [], []
    for rows, width in [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]:
        weight, x = torch.randn(rows, width), torch.randn(1, width)
        codes, scale = quantize_weight(weight)
        buffers = (*pack.pack(codes), scale)
        plain += [(x, weight.clone()) for _ in range(layers)]
        packed += [(x, *(part.clone() for part in buffers)) for _ in range(layers)]

    def floats() -> None:
        for x, weight in plain:
            torch.nn.functional.linear(x, weight)

    def integers() -> None:
        for x, hi, lo, scale in packed:
            torch.ops.lincompile.int6_linear(x, hi, lo, scale, None, 128, "a8")

    pairs = [(seconds(floats), seconds(integers)) for _ in range(runs + 2)][2:]
    return {
        "layers": len(plain),
        "float32_us": round(1e6 * statistics.median(a for a, _ in pairs), 1),
        "int6_us": round(1e6 * statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("int6_cpu.json"))
    parser.add_argument("--runs", type=int, default=101)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    compiled = cpu.supports(torch.zeros(1, 128), 128, "a8")
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    result = {
        "processor": model.partition(":")[2].strip() or platform.processor(),
        "torch": torch.__version__,
        "compiled_kernel": compiled,
        "model": measure_model(max(5, arguments.runs // 5)),
        "shapes": [measure(rows, width, arguments.runs) for rows, width in SHAPES],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
