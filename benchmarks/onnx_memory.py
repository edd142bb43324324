"""What a process grows by when it loads six-bit linears: bytes per weight, by layout.

    python benchmarks/onnx_memory.py [--output benchmarks/results/onnx_memory.json]

The linear layers of 2 and of 12 layers of SmolLM2-135M; the difference is what weights cost, without what a session
costs whatever its size. Each is loaded in a process of its own: anonymous memory (what no file backs) after loading and
one token, before and after what loading freed is handed back (as lincompile's sessions do), and the peak on the way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from onnx_native import HIDDEN, KV_WIDTH, WIDTH, linears
from versions import machine, versions

_PROCESS = f"""
import ctypes, sys
import numpy, onnxruntime
from lincompile.lowering.native.library import register
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
kernels = register(options) if sys.argv[2] == "native" else None
before, resident = status("RssAnon"), status("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
loaded, peak = status("RssAnon") - before, status("VmHWM") - resident
ctypes.CDLL(None).malloc_trim(0)
session.run(None, {{"x": numpy.ones((1, 1, {WIDTH}), numpy.float32)}})
print(loaded, status("RssAnon") - before, peak, kernels)
"""
LAYERS = (2, 12)
WEIGHTS = 2 * WIDTH * WIDTH + 2 * KV_WIDTH * WIDTH + 3 * HIDDEN * WIDTH  # of a layer


def growth(path: Path, layout: str) -> tuple[list[int], str]:
    command = [sys.executable, "-c", _PROCESS, str(path), layout]
    *sizes, kernels = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [int(size) for size in sizes], kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for layout in ("planes", "int8", "native"):
            found: list[list[int]] = []
            row: dict[str, Any] = {"layout": layout}
            for layers in LAYERS:
                path = Path(scratch) / f"{layout}-{layers}.onnx"
                path.write_bytes(linears(layers, layout))
                sizes, row["kernels"] = growth(path, layout)
                found.append(sizes)
            weights = (LAYERS[1] - LAYERS[0]) * WEIGHTS
            for name, small, large in zip(("loaded", "after_trim", "peak"), *found, strict=True):
                row[f"{name}_bytes_per_weight"] = round((large - small) / weights, 2)
            rows.append(row)
            print(row, flush=True)
    result = {
        "benchmark": "onnx_memory",
        "command": " ".join(sys.argv),
        "machine": machine(1),
        "versions": versions(),
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
