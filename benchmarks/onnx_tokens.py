"""Greedy tokens of artefacts on stock onnxruntime against torch: free-running, and torch against itself.

    python benchmarks/onnx_tokens.py DIR [DIR …] [--output FILE]

Each DIR is an artefact folder exported with ``lincompile export DIR``. Prompts are 40 tokens of a held-out text. The
control is torch itself with the prompt read in chunks of 8 instead of at once: the same program, other orders of
summation. Where the control parts from torch, equal tokens are more than any second implementation could give.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from versions import machine, versions

from lincompile.lowering.generate import generate
from lincompile.lowering.onnx.session import OnnxSession
from lincompile.lowering.package import open_artefact

TEXT = Path(__file__).parents[1] / "cli" / "data" / "demo-heldout.txt"
STARTS = (2_000, 12_000, 30_000)  # characters into the text


def first_difference(one: list[int], other: list[int]) -> int | None:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), None)


def compare(directory: Path, lengths: tuple[int, ...], threads: int) -> list[dict[str, Any]]:
    artefact = open_artefact(directory, verify=False)
    session = OnnxSession(directory / "onnx", threads=threads)
    quantization = artefact.manifest.get("quantization")
    text = TEXT.read_text(encoding="utf-8")
    rows = []
    for start, length in zip(STARTS, lengths, strict=True):
        prompt = [artefact.tokenizer.encode(text[start : start + 1000])[:40]]
        wanted = generate(artefact.session, prompt, length)
        found = generate(session, prompt, length)
        control = generate(artefact.session, prompt, length, chunk=8)
        ours, theirs, again = wanted.tokens[0], found.tokens[0], control.tokens[0]
        row = {
            "model": directory.name,
            "schemes": quantization["totals"]["schemes"] if quantization else "float",
            "tokens": len(ours),
            "distinct_tokens": len(set(ours)),
            "equal": sum(a == b for a, b in zip(ours, theirs, strict=False)),
            "first_difference": first_difference(ours, theirs),
            "torch_in_chunks_of_8": {
                "equal": sum(a == b for a, b in zip(ours, again, strict=False)),
                "first_difference": first_difference(ours, again),
            },
            "decode_tokens_per_second": {
                "torch": round(wanted.decode_tokens_per_second, 1),
                "onnxruntime": round(found.decode_tokens_per_second, 1),
            },
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefacts", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--tokens", type=int, nargs=3, default=(256, 64, 64), help="new tokens of the three prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for directory in options.artefacts for row in compare(directory, options.tokens, options.threads)]
    if options.output:
        result = {
            "benchmark": "onnx_tokens",
            "command": " ".join(sys.argv),
            "machine": machine(options.threads),
            "versions": versions(),
            "rows": rows,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
