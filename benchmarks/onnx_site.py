"""A whole attention site, LAWCAT beside a window of 64 in SmolLM2-135M's sizes: stock operators and the native library.

    python benchmarks/onnx_site.py --out benchmarks/results/onnx_site.json
    python benchmarks/onnx_site.py --rotated --out benchmarks/results/onnx_site_rotated.json

``stock`` is the operator's body, which onnxruntime runs without the library; ``native`` its kernel. Milliseconds as in
``onnx_native.py``; ``LINCOMPILE_NATIVE=avx2`` measures those kernels. ``--rotated`` is the form in which LAWCAT reads
queries and keys after their rotary embedding, as in the shipped adapters.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_native import measure, session
from versions import machine, versions

from lincompile.lowering.native import library
from lincompile.lowering.onnx.functions import attach_bodies
from lincompile.lowering.onnx.lawcat import INPUTS, LAWCAT_WINDOW, Sizes, body

SIZES = Sizes(heads=9, kv_heads=3, size=64, taps=4, rank=16, window=64, scale=0.125, softcap=0.0, temperature=16.0)
HIDDEN = 576
STEPS = ("qkv", "hidden", "cos", "sin", "mask")  # inputs of each token
STATES = ("past_conv", "past_state")


def shapes(tokens: int) -> dict[str, list[int]]:
    heads, kv_heads, size = SIZES.heads, SIZES.kv_heads, SIZES.size
    sizes = [[1, tokens, (heads + 2 * kv_heads) * size], [1, tokens, HIDDEN], [1, tokens, size], [1, tokens, size]]
    sizes += [[1, tokens], [1, SIZES.channels, SIZES.taps - 1], [1, sum(SIZES.state)], [SIZES.taps, SIZES.channels]]
    sizes += [[kv_heads, size, size], [kv_heads, size], [SIZES.rank + 2 * heads, HIDDEN]]
    sizes += [[SIZES.rank, kv_heads * 2 * size], [kv_heads * 2 * size], [2 * heads]]
    return dict(zip(INPUTS, sizes, strict=True))


def site(sizes: Sizes) -> bytes:
    """One node: the steps and states are inputs, the weights are stored."""
    rng = np.random.default_rng(0)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="site")
    given = []
    for name, shape in shapes(1).items():
        if name in STEPS + STATES:
            axes: list[int | str] = ["B", "T", *shape[2:]] if name in STEPS else ["B", *shape[1:]]
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(axes))
            graph.inputs.append(value)
        else:
            tensor = ir.tensor(rng.standard_normal(shape).astype(np.float32) * 0.1, name=name)
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
            graph.register_initializer(value)
        given.append(value)
    attributes = {"num_heads": SIZES.heads, "kv_num_heads": SIZES.kv_heads, "window": SIZES.window}
    attributes |= {"scale": SIZES.scale, "softcap": SIZES.softcap, "temperature": SIZES.temperature}
    attributes |= {"rotated": sizes.rotated}
    node = ir.node(LAWCAT_WINDOW, given, attributes, domain=library.DOMAIN, num_outputs=3)
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.extend(node.outputs)
    model = ir.Model(graph, ir_version=10)
    function = body(sizes)
    model.functions[function.identifier()] = function
    graph.opset_imports[library.DOMAIN] = 1
    attach_bodies(model)
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def feed(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes(tokens).items()
        if name in STEPS + STATES
    }
    angles = rng.random(made["cos"].shape, np.float32) * 6
    made |= {"cos": np.cos(angles), "sin": np.sin(angles), "mask": np.ones((1, tokens), np.float32)}
    state = made["past_state"]
    state[:] = np.abs(state)  # a normaliser is positive
    state[:, -(SIZES.window - 1) :] = 1.0
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--rotated", action="store_true", help="LAWCAT reads rotated queries and keys")
    options = parser.parse_args()
    model, rows = site(replace(SIZES, rotated=int(options.rotated))), []
    for threads in options.threads:
        sessions = {name: session(model, threads, name == "native") for name in ("stock", "native")}
        for tokens in (1, 16, 128, 1024):
            row: dict[str, Any] = {"threads": threads, "tokens": tokens}
            rows.append(row | measure(sessions, feed(tokens), options.seconds))
            print(rows[-1], flush=True)
    result = {
        "benchmark": "onnx_site",
        "command": " ".join(sys.argv),
        "machine": machine(),
        "versions": versions(),
        "kernels": library.register(ort.SessionOptions()),
        "rows": rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
