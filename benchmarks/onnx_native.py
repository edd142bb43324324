"""The native library beside onnxruntime's own kernels: all linear layers of SmolLM2-135M in one graph, runs in turn.

    python benchmarks/onnx_native.py --out benchmarks/results/onnx_native.json

``planes`` and ``int8`` are the stock layouts, ``native`` the same weights through the library, ``native_stock`` that
same file without it. Every layer has weights of its own, so that a token reads them from memory as decoding does.
Times are milliseconds, the best of the repetitions of each; speedups are medians of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from lincompile.kernels import ops  # noqa: F401  registers torch.ops.lincompile
from lincompile.kernels.int6_linear.pack import pack
from lincompile.lowering.native import library
from lincompile.lowering.onnx.functions import attach_bodies
from lincompile.lowering.onnx.quantized import lower_quantized

WIDTH, KV_WIDTH, HIDDEN = 576, 192, 1536
TOKENS = (1, 4, 16, 128, 512)


def linears(layers: int, layout: str) -> bytes:
    """q, k, v, o, gate, up and down of each layer, one feeding the next; what feeds nothing is an output."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "T", WIDTH]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="linears")
    torch.manual_seed(0)

    def linear(value: ir.Value, rows: int, width: int) -> ir.Value:
        codes = torch.randint(-31, 32, (rows, width), dtype=torch.int8)
        scale = torch.full((rows, -(-width // 128)), 0.05 / width**0.5, dtype=torch.float16)
        stored = []
        for name, tensor in zip(("weight_hi", "weight_lo", "weight_scale"), (*pack(codes), scale), strict=True):
            full = f"{len(graph)}.{name}"
            array = ir.tensor(tensor.numpy(), name=full)
            item = ir.Value(name=full, const_value=array, shape=ir.Shape(tensor.shape), type=ir.TensorType(array.dtype))
            graph.register_initializer(item)
            stored.append(item)
        attributes = {"group_size": 128, "activation": "a8"}
        node = ir.node("Int6Linear", [value, *stored, None], attributes, domain="lincompile")
        out = node.outputs[0]
        out.name, out.type, out.shape = f"y{len(graph)}", value.type, ir.Shape(["B", "T", rows])
        graph.append(node)
        return out

    unread = []
    for _ in range(layers):
        q = linear(x, WIDTH, WIDTH)
        unread += [linear(x, KV_WIDTH, WIDTH), linear(x, KV_WIDTH, WIDTH)]
        o = linear(q, WIDTH, WIDTH)
        unread.append(linear(o, HIDDEN, WIDTH))
        x = linear(linear(o, HIDDEN, WIDTH), WIDTH, HIDDEN)
    graph.outputs.extend([*unread, x])
    model = ir.Model(graph, ir_version=10)
    lower_quantized(model, layout)
    attach_bodies(model)
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def session(model: bytes, threads: int, native: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if native:
        library.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure(sessions: dict[str, ort.InferenceSession], feed: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in sessions}
    expected = sessions["planes"].run(None, feed)[0]
    for run in sessions.values():  # of the first layer: a code that falls the other way changes all that follows it
        found = run.run(None, feed)[0]
        assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["planes"]) < 5:
        for name, run in sessions.items():
            time.sleep(0.01)  # until the threads of the session before stop spinning
            run.run(None, feed)
            begun = time.perf_counter()
            run.run(None, feed)
            times[name].append((time.perf_counter() - begun) * 1e3)
    row: dict[str, Any] = {f"{name}_ms": round(min(values), 2) for name, values in times.items()}
    for name in ("planes", "int8"):
        ratios = [slow / fast for slow, fast in zip(times[name], times["native"], strict=True)]
        row[f"speedup_over_{name}"] = round(statistics.median(ratios), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    options = parser.parse_args()
    models = {name: linears(options.layers, name) for name in ("planes", "int8", "native")}
    rows = []
    for threads in (1, 2):
        sessions = {name: session(model, threads, name == "native") for name, model in models.items()}
        sessions["native_stock"] = session(models["native"], threads, False)
        for tokens in TOKENS:
            x = np.random.default_rng(0).standard_normal((1, tokens, WIDTH)).astype(np.float32)
            row = {"threads": threads, "tokens": tokens, **measure(sessions, {"x": x}, options.seconds)}
            rows.append(row)
            print(row, flush=True)
    processor = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    result = {
        "benchmark": "onnx_native",
        "machine": {
            "processor": processor.partition(":")[2].strip() or platform.machine(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
        },
        "kernels": library.register(ort.SessionOptions()),
        "versions": {"onnxruntime": ort.__version__, "torch": torch.__version__},
        "layers": options.layers,
        "rows": rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
