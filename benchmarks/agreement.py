"""Do the Triton kernels compute on a trained model what the references compute? Which op doesn't?

    python benchmarks/agreement.py MODEL --adapter FILE --window 64 --text TEXT --device cuda --json agreement.json

A converted model with trained gates and maps reaches ranges that random inputs don't. Its perplexity on a few windows
of a text is measured with the references for all ops, with the kernels for all, and with the kernels for one op at a
time; and every kernel's result on the model's own operands is compared with the reference in float64, site by site.
Under ``TRITON_INTERPRET=1`` the same runs on a CPU, in float32 and slowly (``--context 200 --windows 1``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from distil_measure import perplexity
from torch import Tensor
from versions import versions

from lincompile.kernels.registration import triton_module
from lincompile.lowering.compiler import capture_loaded, prove, rewrite
from lincompile.lowering.options import Options
from lincompile.lowering.text import read_tokens
from lincompile.passes.distil.adapter import apply_adapter
from lincompile.passes.distil.instrument import TrainingGraph, instead, unpadded
from lincompile.passes.formats.load import load_model

# op: the function of its kernels and its reference that a forward pass calls
OPS = {
    "linear_attention": "chunkwise",
    "hedgehog_features": "forward",
    "decay_gate": "forward",
    "short_conv": "forward",
    "softmax_attention": "forward",
}


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


class Compared:
    """Kernels whose every result is compared with the reference in float64 on the same operands."""

    def __init__(self, kernels: ModuleType, reference: ModuleType, function: str, rows: list[dict[str, Any]]) -> None:
        self.kernels, self.reference, self.function, self.rows = kernels, reference, function, rows
        self.worst: tuple[float, Any, Any] = -1.0, None, None  # error, operands, results

    def __getattr__(self, name: str) -> Any:
        plain = getattr(self.kernels, name)
        if name != self.function:
            return plain

        def run(*args: Any) -> Any:
            got = plain(*args)
            with torch.autocast(args[0].device.type, enabled=False):
                want = getattr(self.reference, name)(*map(wide, args))
            have, need = (result if isinstance(result, Tensor) else result[0] for result in (got, want))
            rows = (have.double() - need).square().sum(-1), need.square().sum(-1)
            late = rows[0].shape[-1] // 2
            error, later = (
                float((rows[0][..., part].sum() / rows[1][..., part].sum().clamp(min=1e-30)).sqrt())
                for part in (slice(None), slice(late, None))
            )
            self.rows.append({"shape": list(have.shape), "error": error, "second half": later})
            if not later <= self.worst[0]:
                self.worst = later, args, got
            return got

        return run


@contextlib.contextmanager
def using(chosen: Callable[[str], Any]) -> Iterator[None]:
    """Within, the op ``name`` has ``chosen(name)`` for its kernels (None: the reference runs)."""
    modules = {name: importlib.import_module(f"lincompile.kernels.{name}.op") for name in OPS}
    plain = {name: module.backend for name, module in modules.items()}
    for module in modules.values():
        module.backend = lambda folder, x, file="triton": chosen(folder) if file == "triton" else None
    try:
        yield
    finally:
        for name, module in modules.items():
            module.backend = plain[name]


def build(asked: argparse.Namespace, dtype: torch.dtype) -> tuple[TrainingGraph, TrainingGraph, Tensor]:
    """The student, its teacher and the tokens: a float32 model computes under bfloat16 autocast on a GPU."""
    loaded = load_model(asked.model, dtype=dtype, device=asked.device)
    shape = Options(attn=asked.attn, window=asked.window, keep_softmax=asked.keep_softmax, adapter=str(asked.adapter))
    teacher = prove(capture_loaded(loaded), shape)
    student = rewrite(teacher, shape)
    apply_adapter(asked.adapter, teacher, student, source_hash=loaded.source_hash)
    graph = instead(teacher, student)
    for branch in graph.branches.values():
        branch.fuse = dtype == torch.float32
    ids = read_tokens(asked.text, loaded.tokenizer)[: asked.context * asked.windows]
    return graph, unpadded(teacher), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--attn", default="lawcat")
    parser.add_argument("--window", type=int)
    parser.add_argument("--keep-softmax")
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--operands", type=Path, help="a folder for the operands and results of each op's worst call")
    asked = parser.parse_args()
    graph, teacher, ids = build(asked, torch.float32)
    exact, exact_teacher, _ = build(asked, torch.float64)
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions(), "perplexity": {}, "nll": {}}

    def measure(name: str, graph: TrainingGraph) -> None:
        rows = [perplexity(graph, window, asked.context, None)["nll"] for window in ids.split(asked.context)]
        found = math.exp(sum(rows) / len(rows))
        result["perplexity"][name], result["nll"][name] = found, rows
        base = result["perplexity"].get("teacher", found)
        print(f"{name:36s} {found:9.3f}  {found / base:.4f}x", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    kernels = {name: triton_module(name) for name in OPS}
    measure("teacher", teacher)
    measure("teacher, float64", exact_teacher)
    with using(lambda name: None):
        measure("references", graph)
        measure("references, float64", exact)
    with using(kernels.get):
        measure("kernels", graph)
    for only in OPS:
        with using(lambda name, only=only: kernels[name] if name == only else None):  # type: ignore[misc]
            measure(f"kernels for {only} only", graph)
    errors: dict[str, list[dict[str, Any]]] = {name: [] for name in OPS}
    pairs = {
        name: Compared(module, importlib.import_module(f"lincompile.kernels.{name}.reference"), OPS[name], errors[name])
        for name, module in kernels.items()
        if module is not None
    }
    ids = ids[: asked.context]
    with using(pairs.get):
        measure("kernels, compared", graph)
    result["errors"] = errors
    for name, pair in pairs.items() if asked.operands else ():
        asked.operands.mkdir(parents=True, exist_ok=True)
        torch.save(pair.worst[1:], asked.operands / f"{name}.pt")
    for name, rows in errors.items():
        worst = sorted(((row["second half"], row["error"], site) for site, row in enumerate(rows)), reverse=True)[:3]
        print(f"{name:20s} {len(rows)} calls, worst (second half of the tokens, all, call):", worst, flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(math.isfinite(value) for value in result["perplexity"].values()):
        sys.exit("agreement: a perplexity isn't finite")


if __name__ == "__main__":
    main()
