"""The attention part under onnxruntime: LinearAttention with constant state against GroupQueryAttention with its cache.

    python benchmarks/onnx_attention.py [--threads 2] [--output benchmarks/results/onnx_attention.json]

SmolLM2's heads (9 query, 3 key, size 64). The linear site is LAWCAT's: 128 features per head, a ones column on v,
per-feature decay. GroupQueryAttention gets what it likes best: past and present in one preallocated buffer, so that
a token copies nothing. Both run in the same process, in turns; each number is the best of its repetitions, which on a
machine that does other things too is the one that says something about the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from versions import machine, versions

HEADS, KV_HEADS, SIZE = 9, 3, 64
FEATURES, COLUMNS = 128, 65


def session(inputs: dict[str, tuple[int, list[Any]]], node: onnx.NodeProto, threads: int) -> ort.InferenceSession:
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, 1, None) for name in node.output],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def linear_session(threads: int) -> ort.InferenceSession:
    node = helper.make_node(
        "LinearAttention",
        ["q", "k", "v", "state", "decay"],
        ["o", "new_state"],
        domain="com.microsoft",
        update_rule="gated",
        q_num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=1.0,
    )
    inputs = {
        "q": (1, ["B", "T", HEADS * FEATURES]),
        "k": (1, ["B", "T", KV_HEADS * FEATURES]),
        "v": (1, ["B", "T", KV_HEADS * COLUMNS]),
        "state": (1, ["B", KV_HEADS, FEATURES, COLUMNS]),
        "decay": (1, ["B", "T", KV_HEADS * FEATURES]),
    }
    return session(inputs, node, threads)


def softmax_session(threads: int) -> ort.InferenceSession:
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "last", "total"],
        ["o", "new_k", "new_v"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=SIZE**-0.5,
    )
    inputs = {
        "q": (1, ["B", "T", HEADS * SIZE]),
        "k": (1, ["B", "T", KV_HEADS * SIZE]),
        "v": (1, ["B", "T", KV_HEADS * SIZE]),
        "past_k": (1, ["B", KV_HEADS, "P", SIZE]),
        "past_v": (1, ["B", KV_HEADS, "P", SIZE]),
        "last": (6, ["B"]),
        "total": (6, []),
    }
    return session(inputs, node, threads)


def bind_linear(run: ort.InferenceSession, time_steps: int, seed: int = 0) -> ort.IOBinding:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    feed = {
        "q": normal(1, time_steps, HEADS * FEATURES),
        "k": normal(1, time_steps, KV_HEADS * FEATURES),
        "v": normal(1, time_steps, KV_HEADS * COLUMNS),
        "state": normal(1, KV_HEADS, FEATURES, COLUMNS),
        "decay": -np.abs(normal(1, time_steps, KV_HEADS * FEATURES)) / 16,
    }
    binding = run.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    for name in ("o", "new_state"):
        binding.bind_output(name, "cpu")
    binding.kept = feed  # the binding holds pointers, not references
    return binding


def bind_softmax(run: ort.InferenceSession, time_steps: int, context: int, seed: int = 0) -> ort.IOBinding:
    """``time_steps`` new tokens that bring the cache to ``context`` tokens."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    binding = run.io_binding()
    feed: dict[str, Any] = {
        "q": normal(1, time_steps, HEADS * SIZE),
        "k": normal(1, time_steps, KV_HEADS * SIZE),
        "v": normal(1, time_steps, KV_HEADS * SIZE),
        "last": np.array([context - 1], np.int32),
        "total": np.array(context, np.int32),
    }
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    for old, new in (("past_k", "new_k"), ("past_v", "new_v")):
        buffer = ort.OrtValue.ortvalue_from_numpy(normal(1, KV_HEADS, context, SIZE))
        binding.bind_ortvalue_input(old, buffer)
        binding.bind_ortvalue_output(new, buffer)
        feed[old] = buffer
    binding.bind_output("o", "cpu")
    binding.kept = feed
    return binding


def best_of(jobs: dict[str, tuple[ort.InferenceSession, ort.IOBinding]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each job, by wall clock and by processor time: the best of repetitions taken in turns."""
    best = {name: [float("inf")] * 2 for name in jobs}
    for run, binding in jobs.values():
        run.run_with_iobinding(binding)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        for name, (run, binding) in jobs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run.run_with_iobinding(binding)
            taken = (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3
            best[name] = [min(pair) for pair in zip(best[name], taken, strict=True)]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="per measurement")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    linear, softmax = linear_session(options.threads), softmax_session(options.threads)
    rows = []
    cases = [("decode", 1, 2048), ("decode", 1, 8192), ("decode", 1, 32768), ("prefill", 8192, 8192)]
    for phase, steps, context in cases:
        jobs = {
            "linear": (linear, bind_linear(linear, steps)),
            "softmax": (softmax, bind_softmax(softmax, steps, context)),
        }
        best = best_of(jobs, options.seconds if steps == 1 else 4 * options.seconds)
        row: dict[str, Any] = {"phase": phase, "context": context}
        for index, clock in enumerate(("wall", "processor")):
            row |= {f"{name}_{clock}_ms": round(taken[index], 4) for name, taken in best.items()}
            row[f"{clock}_speedup"] = round(best["softmax"][index] / best["linear"][index], 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "benchmark": "onnx_attention",
        "command": " ".join(sys.argv),
        "machine": machine(options.threads),
        "versions": versions(),
        "state_bytes": KV_HEADS * FEATURES * COLUMNS * 4,
        "cache_bytes_per_token": 2 * KV_HEADS * SIZE * 4,
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
