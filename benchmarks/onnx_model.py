"""Whole models under onnxruntime: size, memory, equality with torch, decoding after a context, reading a prompt.

    python benchmarks/onnx_model.py DIR [DIR …] [--context 8192] [--prefill 8192] [--embeddings int6] [--output FILE]

Each DIR is an artefact folder; speeds are compared with the first, so give one compiled with ``--attn softmax`` first.
Its layers have past and present in one preallocated buffer. The models take turns in one process, and each time is the
best of its repetitions, by wall clock and by processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import torch
from versions import machine, versions

from lincompile.lowering.generate import generate
from lincompile.lowering.native import library
from lincompile.lowering.onnx.export import MODEL_FILE, export_onnx
from lincompile.lowering.onnx.metadata import Signature
from lincompile.lowering.onnx.session import OnnxSession
from lincompile.lowering.package import open_artefact

_MEMORY = """
import json, sys, onnxruntime, torch
from lincompile.lowering.onnx.session import OnnxSession
def sizes():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM")}
def growth():
    return {name: size - before[name] for name, size in sizes().items()}
def call(tokens):
    ids = torch.ones(1, tokens, dtype=torch.int64)
    session(ids, torch.arange(tokens)[None], ids == 1, session.initial_states(1))
before = sizes()
session = OnnxSession(sys.argv[1], threads=1)
found = {"loaded": growth()}
call(1)
found["one_token"] = growth()
call(512)
call(1)
found["512_tokens_and_one"] = growth()
print(json.dumps(found | {"kernels": session.native}))
"""


def memory(folder: Path) -> dict[str, Any]:
    """Bytes that a process grows by, onnxruntime imported before: once loaded, after a token, after a prefill."""
    shown = subprocess.run([sys.executable, "-c", _MEMORY, str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def of_last_token(path: Path) -> bytes:
    """The file with −1 for the default of ``logits_from``: a binding can't give an input that has a default."""
    model = onnx.load(path)
    (default,) = [item for item in model.graph.initializer if item.name == "logits_from"]
    default.CopyFrom(onnx.numpy_helper.from_array(np.array([-1]), "logits_from"))
    data: bytes = model.SerializeToString()
    return data


class Runner:
    """One model with its states bound once, growing ones as shared buffers of ``context`` tokens."""

    def __init__(self, folder: Path, context: int, threads: int, last: bool = False) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = folder / MODEL_FILE
        if library.calls_native_operators(path):
            library.register(options)
        model = of_last_token(path) if last else str(path)
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.names = {item.name for item in self.session.get_inputs()}
        self.states = Signature.read(dict(self.session.get_modelmeta().custom_metadata_map)).states
        rng = np.random.default_rng(0)
        self.buffers = {}
        for state in self.states:
            shape = [1, *(context if size is None else size for size in state.shape)]
            values = rng.standard_normal(shape).astype(np.float32) * 0.1
            self.buffers[state.past] = ort.OrtValue.ortvalue_from_numpy(values)

    def bind(self, first: int, count: int) -> ort.IOBinding:
        """Tokens ``first … first + count − 1``, which attend to all before them."""
        binding = self.session.io_binding()
        binding.kept = {  # the binding holds pointers, not references
            "input_ids": np.arange(count)[None] % 4096,
            "position_ids": np.arange(first, first + count)[None],
            "attention_mask": np.ones((1, first + count), np.int64),
        }
        for name in binding.kept.keys() & self.names:
            binding.bind_cpu_input(name, binding.kept[name])
        binding.bind_output("logits", "cpu")
        for state in self.states:
            buffer = self.buffers[state.past]
            binding.bind_ortvalue_input(state.past, buffer)
            if state.role in ("key", "value"):
                binding.bind_ortvalue_output(state.present, buffer)
            else:
                binding.bind_output(state.present, "cpu")
        return binding

    def milliseconds(self, *bindings: ort.IOBinding) -> tuple[float, float]:
        """Wall clock, and processor time of all threads, which other work on the machine lengthens less."""
        wall, processor = time.perf_counter(), time.process_time()
        for binding in bindings:
            self.session.run_with_iobinding(binding)
        return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def in_turns(jobs: dict[str, tuple[Runner, list[ort.IOBinding]]], seconds: float, least: int) -> dict[str, Any]:
    """Best milliseconds of each job and how many times faster than the first it is, by both clocks."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or any(len(taken) < least for taken in times.values()):
        for name, (runner, bindings) in jobs.items():
            times[name].append(runner.milliseconds(*bindings))
    best = {name: [round(min(column), 2) for column in zip(*taken, strict=True)] for name, taken in times.items()}
    first = best[next(iter(best))]
    row: dict[str, Any] = {"repetitions": min(map(len, times.values())), "load_average": os.getloadavg()[0]}
    for index, clock in enumerate(("wall", "processor")):
        row[f"{clock}_milliseconds"] = {name: found[index] for name, found in best.items()}
        row[f"{clock}_speedup"] = {name: round(first[index] / found[index], 2) for name, found in best.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefacts", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192], help="tokens of a prompt")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of the prompt read at once")
    parser.add_argument(
        "--logits",
        nargs="+",
        choices=["all", "last"],
        default=["last", "all"],
        help="of a prompt's chunks: those of the last token, as lincompile's sessions ask for, or of all tokens",
    )
    parser.add_argument("--repetitions", type=int, default=2, help="of each prefill")
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
        # Eight bits are a layout of quantized weights; native operators run attention and norms in float32 too.
        for layout in options.layout if quantized else [name for name in options.layout if name != "int8"]:
            name = f"{directory.name}-{layout}-{options.embeddings}"
            folder = work / name
            record = folder / "report.json"
            if not record.is_file():
                report = export_onnx(artefact.step, folder, layout=layout, embeddings=options.embeddings)
                record.write_text(json.dumps(report.record()))
            report_record = json.loads(record.read_text())
            row = {key: report_record[key] for key in ("bytes", "parameters", "seconds", "verified", "quantized")}
            row |= {"model": name, "bytes_per_parameter": row["bytes"] / row["parameters"]}
            row["memory"] = memory(folder)
            if options.tokens and options.embeddings == "float":
                prompt = [list(range(100, 140))]
                wanted = generate(artefact.session, prompt, options.tokens).tokens[0]
                got = generate(OnnxSession(folder, threads=options.threads), prompt, options.tokens).tokens[0]
                row["greedy_tokens"] = len(wanted)
                row["greedy_equal"] = sum(one == other for one, other in zip(wanted, got, strict=False))
            rows.append(row)
            folders[name] = folder
            print(json.dumps(row), flush=True)
    decode, prefill = [], []
    for context in options.context:
        runners = {name: Runner(folder, context, options.threads) for name, folder in folders.items()}
        jobs = {name: (runner, [runner.bind(context - 1, 1)]) for name, runner in runners.items()}
        decode.append({"context": context, **in_turns(jobs, options.seconds, 4)})
        print(json.dumps(decode[-1]), flush=True)
    for length in options.prefill:
        for logits in options.logits:
            runners = {
                name: Runner(folder, length, options.threads, logits == "last") for name, folder in folders.items()
            }
            jobs = {
                name: (runner, [runner.bind(start, options.chunk) for start in range(0, length, options.chunk)])
                for name, runner in runners.items()
            }
            times = in_turns(jobs, 0, options.repetitions)
            prefill.append({"tokens": length, "chunk": options.chunk, "logits": logits, **times})
            print(json.dumps(prefill[-1]), flush=True)
    return {
        "benchmark": "onnx_model",
        "command": " ".join(sys.argv),
        "machine": machine(options.threads),
        "versions": versions(),
        "models": rows,
        "decode": decode,
        "prefill": prefill,
    }


if __name__ == "__main__":
    main()
