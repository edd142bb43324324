"""Whole models under onnxruntime: size, memory, equality with torch, decode speed at a given context.

    python benchmarks/onnx_model.py DIR [DIR …] [--context 8192] [--embeddings int6] [--output FILE]

Each DIR is an artefact folder; give a linear one and one compiled with ``--attn softmax`` to compare them. Softmax
layers decode with past and present in one preallocated buffer. The models take turns in one process, and each time is
the best of its repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from lincompile.lowering.generate import generate
from lincompile.lowering.onnx.export import MODEL_FILE, export_onnx
from lincompile.lowering.onnx.session import OnnxSession
from lincompile.lowering.onnx.signature import Signature
from lincompile.lowering.package import open_artefact

_MEMORY = """
import sys, torch
from lincompile.lowering.onnx.session import OnnxSession
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024
before = resident()
session = OnnxSession(sys.argv[1], threads=2)
one = torch.ones(1, 1, dtype=torch.int64)
session(one, one, one == 1, session.initial_states(1))
print(resident() - before)
"""


def memory_bytes(folder: Path) -> int:
    """What a process grows by when it loads the model and runs one token."""
    shown = subprocess.run([sys.executable, "-c", _MEMORY, str(folder)], capture_output=True, text=True, check=True)
    return int(shown.stdout)


class Decoder:
    """One token after ``context − 1`` tokens, states bound once (growing ones as shared buffers)."""

    def __init__(self, folder: Path, context: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = str(folder / MODEL_FILE)
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        states = Signature.read(dict(self.session.get_modelmeta().custom_metadata_map)).states
        rng = np.random.default_rng(0)
        self.binding = self.session.io_binding()
        self.kept: list[Any] = []  # the binding holds pointers, not references
        feeds = {
            "input_ids": np.ones((1, 1), np.int64),
            "position_ids": np.full((1, 1), context - 1, np.int64),
            "attention_mask": np.ones((1, context), np.int64),
        }
        names = {item.name for item in self.session.get_inputs()}
        for name, value in feeds.items():
            if name in names:
                self.kept.append(value)
                self.binding.bind_cpu_input(name, value)
        self.binding.bind_output("logits", "cpu")
        for state in states:
            shape = [1, *(context if size is None else size for size in state.shape)]
            buffer = ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape).astype(np.float32) * 0.1)
            self.kept.append(buffer)
            self.binding.bind_ortvalue_input(state.past, buffer)
            if state.role in ("key", "value"):
                self.binding.bind_ortvalue_output(state.present, buffer)
            else:
                self.binding.bind_output(state.present, "cpu")

    def milliseconds(self) -> tuple[float, float]:
        """Of one token: wall clock, and processor time, which other work on the machine doesn't lengthen."""
        wall, processor = time.perf_counter(), time.process_time()
        self.session.run_with_iobinding(self.binding)
        return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefacts", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--layout", nargs="+", default=["planes", "int8"])
    parser.add_argument("--embeddings", choices=["float", "int6"], default="float")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens to compare with torch (0: don't)")
    parser.add_argument("--seconds", type=float, default=30.0, help="per context, shared by the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep the exports here, and reuse those that are there")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, options.work or Path(scratch))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    rows, folders = [], {}
    for directory in options.artefacts:
        artefact = open_artefact(directory)
        quantized = bool(artefact.manifest.get("quantization"))
        for layout in options.layout if quantized else ["planes"]:
            name = f"{directory.name}-{layout}-{options.embeddings}"
            folder = work / name
            record = folder / "report.json"
            if not record.is_file():
                report = export_onnx(artefact.step, folder, layout=layout, embeddings=options.embeddings)
                record.write_text(json.dumps(report.record()))
            report_record = json.loads(record.read_text())
            row = {key: report_record[key] for key in ("bytes", "parameters", "seconds", "verified", "quantized")}
            row |= {"model": name, "bytes_per_parameter": row["bytes"] / row["parameters"]}
            row["memory_bytes"] = memory_bytes(folder)
            if options.tokens and options.embeddings == "float":
                prompt = [list(range(100, 140))]
                wanted = generate(artefact.session, prompt, options.tokens).tokens[0]
                got = generate(OnnxSession(folder, threads=options.threads), prompt, options.tokens).tokens[0]
                row["greedy_tokens"] = len(wanted)
                row["greedy_equal"] = sum(one == other for one, other in zip(wanted, got, strict=False))
            rows.append(row)
            folders[name] = folder
            print(json.dumps(row), flush=True)
    decode = []
    for context in options.context:
        decoders = {name: Decoder(folder, context, options.threads) for name, folder in folders.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
        stop = time.perf_counter() + options.seconds
        while time.perf_counter() < stop or not all(len(taken) >= 4 for taken in times.values()):
            for name, decoder in decoders.items():
                times[name].append(decoder.milliseconds())
        best = {name: [min(column) for column in zip(*taken, strict=True)] for name, taken in times.items()}
        row = {"context": context, "milliseconds_per_token": {name: wall for name, (wall, _) in best.items()}}
        row["processor_milliseconds_per_token"] = {name: processor for name, (_, processor) in best.items()}
        decode.append(row)
        print(json.dumps(decode[-1]), flush=True)
    return {
        "benchmark": "onnx_model",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": options.threads,
            "load_average": os.getloadavg()[0],
        },
        "versions": {"onnxruntime": ort.__version__, "torch": torch.__version__},
        "models": rows,
        "decode": decode,
    }


if __name__ == "__main__":
    main()
