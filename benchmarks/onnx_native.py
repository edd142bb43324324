"""The native library beside onnxruntime's own kernels: the linear layers of SmolLM2-135M, its LAWCAT attention.

    python benchmarks/onnx_native.py --out benchmarks/results/onnx_native.json

All linear layers in one graph: ``planes`` and ``int8`` are the stock layouts, ``native`` the same weights through the
library, ``native_stock`` that same file without it. Every layer has weights of its own, so that a token reads them from
memory as decoding does. One attention layer, where the library has kernels for it: ``stock`` is
com.microsoft.LinearAttention, ``native`` the same call through the library. Times are milliseconds, the best of the
repetitions of each, by wall clock and by processor time of all threads (which other work on the machine lengthens
less); speedups are medians of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from versions import machine, versions

from lincompile.kernels import ops  # noqa: F401  registers torch.ops.lincompile
from lincompile.kernels.int6_linear.pack import pack
from lincompile.lowering.native import library
from lincompile.lowering.onnx.functions import attach_bodies
from lincompile.lowering.onnx.native import lower_attention
from lincompile.lowering.onnx.quantized import lower_quantized

WIDTH, KV_WIDTH, HIDDEN = 576, 192, 1536
TOKENS = (1, 4, 16, 128, 512)
HEADS, KV_HEADS, FEATURES, COLUMNS = 9, 3, 128, 65


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
    for name, value in list(graph.initializers.items()):
        if not value.uses():  # the placeholders' own planes
            del graph.initializers[name]
    attach_bodies(model)
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def attention(native: bool) -> bytes:
    """Queries, keys, values, state and log decays of one LAWCAT layer → outputs and the new state."""
    shapes: dict[str, list[str | int]] = {
        "q": ["B", "T", HEADS * FEATURES],
        "k": ["B", "T", KV_HEADS * FEATURES],
        "v": ["B", "T", KV_HEADS * COLUMNS],
        "s": ["B", KV_HEADS, FEATURES, COLUMNS],
        "g": ["B", "T", KV_HEADS * FEATURES],
    }
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x)) for n, x in shapes.items()]
    attributes = {"update_rule": "gated", "q_num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 1.0}
    node = ir.node("LinearAttention", inputs, attributes, domain="com.microsoft", num_outputs=2)
    for output, name in zip(node.outputs, ("o", "state"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 21}, name="attention")
    model = ir.Model(graph, ir_version=10)
    if native:
        lower_attention(model)
    attach_bodies(model)
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def attention_feed(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "q": rng.random((1, tokens, HEADS * FEATURES), np.float32) / FEATURES,
        "k": rng.random((1, tokens, KV_HEADS * FEATURES), np.float32) / FEATURES,
        "v": rng.standard_normal((1, tokens, KV_HEADS * COLUMNS), np.float32),
        "s": rng.standard_normal((1, KV_HEADS, FEATURES, COLUMNS), np.float32),
        "g": -rng.random((1, tokens, KV_HEADS * FEATURES), np.float32) / 8,
    }


def session(model: bytes, threads: int, native: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # A thread that waits would count as work, and would take the processor from the session measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if native:
        library.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure(sessions: dict[str, ort.InferenceSession], feed: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    stock = [name for name in sessions if "native" not in name]
    expected = sessions[stock[0]].run(None, feed)[0]
    for run in sessions.values():  # of the first layer: a code that falls the other way changes all that follows it
        found = run.run(None, feed)[0]
        assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["native"]) < 5:
        for name, run in sessions.items():
            run.run(None, feed)
            wall, processor = time.perf_counter(), time.process_time()
            run.run(None, feed)
            times[name].append(((time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3))
    row: dict[str, Any] = {}
    for index, clock in enumerate(("", "processor_")):
        row |= {f"{name}_{clock}ms": round(min(taken[index] for taken in values), 3) for name, values in times.items()}
        for name in stock:
            ratios = [slow[index] / fast[index] for slow, fast in zip(times[name], times["native"], strict=True)]
            row[f"{clock}speedup_over_{name}"] = round(statistics.median(ratios), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    options = parser.parse_args()
    kernels = library.register(ort.SessionOptions())
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
    attention_rows = []
    both = {"stock": attention(False), "native": attention(True)}
    for threads in (1, 2) if kernels == "avx512vnni" else ():
        sessions = {name: session(model, threads, name == "native") for name, model in both.items()}
        for tokens in (1, 16, 64, 512, 4096):
            row = {"threads": threads, "tokens": tokens, **measure(sessions, attention_feed(tokens), options.seconds)}
            attention_rows.append(row)
            print(row, flush=True)
    result = {
        "benchmark": "onnx_native",
        "command": " ".join(sys.argv),
        "machine": machine(),
        "versions": versions(),
        "kernels": kernels,
        "layers": options.layers,
        "linears": rows,
        "attention": attention_rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
