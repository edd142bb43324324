"""A model past the 2 GiB that a single ONNX file holds: seconds, memory, files and parity of its export.

    python benchmarks/onnx_large.py --layers 2 --attn lawcat --json benchmarks/results/onnx_large.json

Llama-3-8B's layers with random weights (hidden size 4096, 32 query heads on 8 KV heads, 14,336 wide) and a vocabulary
of ``--vocabulary``; converted without training, which changes neither sizes nor times.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from versions import machine, versions

import lincompile
from lincompile.lowering.onnx.export import export_onnx


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--attn", default="lawcat")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=4096, intermediate_size=14336, num_hidden_layers=options.layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    parameters = sum(x.numel() for x in model.parameters())
    started = time.time()
    step = lincompile.compile(model, attn=options.attn).session.program
    del model
    result: dict[str, Any] = {
        "benchmark": "onnx_large",
        "command": f"benchmarks/onnx_large.py --layers {options.layers} --attn {options.attn}",
        "machine": machine(), "versions": versions(), "parameters": parameters,
        "before_export": {"seconds": round(time.time() - started, 1), "peak_bytes": peak()},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.time(), time.process_time()
        report = export_onnx(step, folder)
        result["export"] = {
            "seconds": round(time.time() - started, 1),
            "processor_seconds": round(time.process_time() - cpu, 1),
            "peak_bytes": peak(),
            "files": {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())},
            "verified": report.verified,
        }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
