"""Would a chunkwise form of standard operators beat onnxruntime's LinearAttention in a prefill? One layer, both timed.

    python benchmarks/onnx_chunkwise.py [--output benchmarks/results/onnx_chunkwise.json]

SmolLM2's heads under LAWCAT (9 query and 3 key heads, 128 features, a ones column on v, a decay per feature). The
chunkwise graph takes chunks of C tokens as matrix products and passes the state on from chunk to chunk by Scan; it
divides by exp of a chunk's decays, so that it overflows where C tokens together decay by more than e^88: only short
chunks are safe. Times are the best of the repetitions, wall clock and processor time (which other work on the machine
doesn't lengthen, and which counts every thread).
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
from onnx import parser
from onnx_attention import COLUMNS, FEATURES, HEADS, KV_HEADS, linear_session
from versions import machine, versions

GROUP = HEADS // KV_HEADS
CHUNKS = (16, 32, 64)
LENGTHS = (64, 512, 2048, 8192)

_GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
chunkwise (float[B,T,{q}] q, float[B,T,{k}] k, float[B,T,{v}] v, float[B,{kv},{f},{c}] state, float[B,T,{k}] decay)
=> (float[B,T,{o}] o, float[B,{kv},{f},{c}] new_state) {{
  query_shape = Constant <value_ints = [0, -1, {n}, {kv}, {g}, {f}]> ()
  key_shape = Constant <value_ints = [0, -1, {n}, {kv}, {f}]> ()
  value_shape = Constant <value_ints = [0, -1, {n}, {kv}, {c}]> ()
  query_split = Reshape (q, query_shape)
  key_split = Reshape (k, key_shape)
  value_split = Reshape (v, value_shape)
  decay_split = Reshape (decay, key_shape)
  queries = Transpose <perm = [1, 0, 3, 4, 2, 5]> (query_split)
  keys = Transpose <perm = [1, 0, 3, 2, 4]> (key_split)
  values = Transpose <perm = [1, 0, 3, 2, 4]> (value_split)
  decays = Transpose <perm = [1, 0, 3, 2, 4]> (decay_split)
  time_axis = Constant <value_int = 3> ()
  summed = CumSum (decays, time_axis)
  last = Constant <value_ints = [{last}]> ()
  whole = Gather <axis = 3> (summed, last)
  factor = Exp (summed)
  negative = Neg (summed)
  inverse = Exp (negative)
  raised_keys = Mul (keys, inverse)
  group_axis = Constant <value_ints = [3]> ()
  group_factor = Unsqueeze (factor, group_axis)
  lowered = Mul (queries, group_factor)
  rows_shape = Constant <value_ints = [0, 0, 0, {rows}, {f}]> ()
  lowered_rows = Reshape (lowered, rows_shape)
  key_columns = Transpose <perm = [0, 1, 2, 4, 3]> (raised_keys)
  products = MatMul (lowered_rows, key_columns)
  triangle = Trilu <upper = 0> (ones)
  triangles = Concat <axis = 0> ({triangles})
  seen = Mul (products, triangles)
  within = MatMul (seen, values)
  whole_factor = Exp (whole)
  kept_keys = Mul (raised_keys, whole_factor)
  kept_columns = Transpose <perm = [0, 1, 2, 4, 3]> (kept_keys)
  updates = MatMul (kept_columns, values)
  state_factor = Transpose <perm = [0, 1, 2, 4, 3]> (whole_factor)
  new_state, across = Scan <num_scan_inputs = 3, body = chunk
    (float[] before, float[] update, float[] by, float[] rows) => (float[] after, float[] read) {{
      read = MatMul (rows, before)
      decayed = Mul (before, by)
      after = Add (decayed, update)
    }}> (state, updates, state_factor, lowered_rows)
  total = Add (within, across)
  head_shape = Constant <value_ints = [0, 0, {kv}, {g}, {n}, {c}]> ()
  heads = Reshape (total, head_shape)
  ordered = Transpose <perm = [1, 0, 4, 2, 3, 5]> (heads)
  out_shape = Constant <value_ints = [0, -1, {o}]> ()
  o = Reshape (ordered, out_shape)
}}"""


def chunkwise_session(chunk: int, threads: int) -> ort.InferenceSession:
    sizes = {"q": HEADS * FEATURES, "k": KV_HEADS * FEATURES, "v": KV_HEADS * COLUMNS, "o": HEADS * COLUMNS}
    sizes |= {"kv": KV_HEADS, "g": GROUP, "f": FEATURES, "c": COLUMNS, "n": chunk, "last": chunk - 1}
    text = _GRAPH.format(**sizes, rows=GROUP * chunk, triangles=", ".join(["triangle"] * GROUP))
    model: onnx.ModelProto = parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((chunk, chunk), np.float32), "ones"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "q": rng.random((1, tokens, HEADS * FEATURES), np.float32) / FEATURES,
        "k": rng.random((1, tokens, KV_HEADS * FEATURES), np.float32) / FEATURES,
        "v": rng.standard_normal((1, tokens, KV_HEADS * COLUMNS), np.float32),
        "state": rng.standard_normal((1, KV_HEADS, FEATURES, COLUMNS), np.float32),
        "decay": -rng.random((1, tokens, KV_HEADS * FEATURES), np.float32) / 8,
    }


def measure(sessions: dict[str, ort.InferenceSession], tokens: int, repetitions: int) -> dict[str, Any]:
    values = feed(tokens)
    expected = sessions["stock"].run(None, values)
    for run in sessions.values():
        for one, other in zip(expected, run.run(None, values), strict=True):
            assert np.abs(one - other).max() < 1e-3 * np.abs(one).max()
    best = {name: (float("inf"), float("inf")) for name in sessions}
    for _ in range(repetitions):
        for name, run in sessions.items():
            wall, processor = time.perf_counter(), time.process_time()
            run.run(None, values)
            took = (time.perf_counter() - wall, time.process_time() - processor)
            best[name] = (min(best[name][0], took[0]), min(best[name][1], took[1]))
    row: dict[str, Any] = {}
    for name, (wall, processor) in best.items():
        row[f"{name}_wall_ms"], row[f"{name}_processor_ms"] = round(wall * 1e3, 2), round(processor * 1e3, 2)
        if name != "stock":
            row[f"{name}_speedup"] = round(best["stock"][0] / wall, 2)
            row[f"{name}_processor_speedup"] = round(best["stock"][1] / processor, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for threads in (1, 2):
        sessions = {"stock": linear_session(threads)}
        sessions |= {f"chunk{size}": chunkwise_session(size, threads) for size in CHUNKS}
        for tokens in LENGTHS:
            rows.append({"threads": threads, "tokens": tokens, **measure(sessions, tokens, options.repetitions)})
            print(rows[-1], flush=True)
    result = {
        "benchmark": "onnx_chunkwise",
        "command": " ".join(sys.argv),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
