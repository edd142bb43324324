"""How the passes' time grows with the number of layers, on a Llama-3-70B-shaped model without weights (meta tensors).

    python benchmarks/passes_scale.py [LAYERS ...]   # default 8 16 32 64 80, into benchmarks/results/passes_scale.json

Export (torch's own) is timed apart. Seconds are of the process's CPU, so that a busy machine shows less in them; the
peak memory is the process's. ``exponent`` is the power of the number of layers that the passes' total grows with, from
the smallest to the largest model: 1 is linear, below 1 is a fixed part that doesn't grow.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lincompile.lowering.compiler import capture_loaded
from lincompile.passes.formats.huggingface import load_pretrained
from lincompile.passes.formats.loaded import LoadOptions
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.plan import plan

OUT = Path(__file__).resolve().parent / "results" / "passes_scale.json"
LAYERS = (8, 16, 32, 64, 80)


def model(layers: int) -> torch.nn.Module:
    """Llama-3-70B with so many layers, on the meta device, in bfloat16."""
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and CPU seconds."""
    started = time.process_time()
    result = work()
    return result, round(time.process_time() - started, 2)


def measure(layers: int) -> dict[str, Any]:
    """CPU seconds of export, of each pass, and of the plan."""
    options = LoadOptions(dtype=torch.bfloat16, meta=True)
    loaded = load_pretrained(
        model(layers), source="llama", source_format="function", options=options, source_hash="none"
    )
    program, export = timed(lambda: capture_loaded(loaded))
    nodes = len(program.graph_module.graph.nodes)
    seconds: dict[str, float] = {}
    program, seconds["canonicalize"] = timed(lambda: Pipeline("canonicalize")(program))
    program, seconds["prove"] = timed(lambda: Pipeline("prove")(program))
    student, seconds["clone"] = timed(program.clone)
    student, seconds["linearize"] = timed(lambda: Pipeline("linearize{attn=lawcat}")(student))
    document, seconds["plan"] = timed(lambda: plan(program, student, "int6"))
    assert all(site.method == "lawcat" for site in student.sites) and len(student.sites) == layers
    return {
        "layers": layers,
        "nodes": nodes,
        "parameters": document["parameters"],
        "export_seconds": export,
        "seconds": seconds,
        "passes_seconds": round(sum(seconds.values()), 2),
    }


def main(wanted: list[int]) -> None:
    """Measures, prints, and writes the results when all default sizes were measured."""
    measure(2)  # imports and caches
    rows = []
    for layers in wanted or LAYERS:
        rows.append(measure(layers))
        print(json.dumps(rows[-1]), flush=True)
    if len(rows) < 2:
        return
    first, last = rows[0], rows[-1]
    grown = last["passes_seconds"] / first["passes_seconds"]
    exponent = math.log(grown) / math.log(last["layers"] / first["layers"])
    document = {
        "model": "Llama-3-70B shape, bfloat16, meta device",
        "rows": rows,
        "exponent": round(exponent, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "machine": f"{platform.processor() or platform.machine()}, CPU seconds of one process",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1))
    if not wanted:
        OUT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([int(item) for item in sys.argv[1:]])
