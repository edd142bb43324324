"""Whole models on one GPU: prefill and decode of what lincompile makes of them, against softmax attention.

    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end.json --plot end_to_end.svg --seconds 540
    python benchmarks/end_to_end.py --table A.json B.json --json all.json --plot all.svg     # from earlier runs

Llama-shaped models with random weights (speed doesn't depend on them), bfloat16, greedy. Arms (``end_to_end_arms.py``):

* lincompile: ``lincompile.compile(model, attn="lawcat", target="triton")``, its session's graph under
  ``torch.compile``; ``differs`` says how far that is from the session as it is;
* hf: the Hugging Face model with SDPA, its layers under ``torch.compile``, decoding over a full static cache without a
  mask (with one, which transformers makes while a CUDA graph is recorded, SDPA repeats the keys and is slower);
* softmax: the same decoder written for speed around FlashAttention, its layers under ``torch.compile``;
* session (by ``--arms``): lincompile's session as it is, without ``torch.compile``;
* int6 (by ``--arms``): the same with six-bit weights (``quant="w6a8"``);
* hybrid (by ``--arms``): the session where every fifth layer or so stays softmax.

Prefill: one sequence, logits of the last token, CUDA events, median. Decode: steps in one CUDA graph, per step, what
carries states from one replay to the next included. Generate: 64 tokens after 128 by each side's own ``generate``, as
a user calls it, by the clock, per token. Every row is saved as soon as it is there; nothing is begun after
``--seconds``. Building a model is the CPU's work: processes with the same ``--alone FILE`` build side by side and time
one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import end_to_end_arms as arms_of
import log_plot
import torch
from end_to_end_arms import ARMS, Runs, Shape
from gpu_timing import alone, guarded, milliseconds, recorded
from versions import versions

BUDGET = 1.0
STEPS = 4  # tokens in one recorded graph
PROMPT, NEW = 128, 64  # tokens of a user's call
LINEAR = ("lincompile", "session", "int6")
SHAPES = [
    Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152),
    Shape("Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, 128256),
    Shape("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256),
]
PREFILL = (8192, 32768)
# batch, tokens in the cache
DECODE = ((1, 2048), (1, 32768), (32, 2048), (32, 8192))
DRY = {
    "SHAPES": [Shape("tiny", 2, 64, 4, 2, 16, 96, 128)],
    "PREFILL": (64, 130),
    "DECODE": ((1, 256), (2, 300)),
    "BUDGET": 0.001,
    "PROMPT": 8,
    "NEW": 3,
}


ALONE: list[Path | None] = [None]  # by --alone


@torch.no_grad()
def prefill(arm: Any, length: int) -> dict[str, Any]:
    """Milliseconds of one sequence, tokens per second, peak GiB beyond what was there before."""
    started = time.perf_counter()
    run: Runs = arm.prefill(length)
    run.call()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    with alone(ALONE[0]):
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        took = milliseconds(run.call, BUDGET)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30
    return {
        "ms": round(took, 3), "tokens_per_second": round(length / took * 1e3), "peak_gib": round(peak, 3),
        "held_gib": round(base / 2**30, 2), "first_s": round(first, 1), **(run.notes or {}),
    }  # fmt: skip


@torch.no_grad()
def decode(arm: Any, batch: int, context: int) -> dict[str, Any]:
    """Milliseconds of a step in a CUDA graph, tokens per second, GiB of state."""
    started = time.perf_counter()
    run: Runs = arm.decode(batch, context)
    run.call()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    notes = {}
    try:
        graph = recorded(lambda: run.call(STEPS))  # type: ignore[call-arg]
        with alone(ALONE[0]):
            took = milliseconds(graph.replay, BUDGET) / STEPS
        graph.reset()
    except RuntimeError as error:
        notes["not recorded"] = str(error)[:200]
        with alone(ALONE[0]):
            took = milliseconds(lambda: run.call(STEPS), BUDGET) / STEPS  # type: ignore[call-arg]
    return notes | {
        "ms": round(took, 4), "tokens_per_second": round(batch / took * 1e3, 1),
        "state_gib": round(run.state_bytes / 2**30, 4), "first_s": round(first, 1),
    }  # fmt: skip


def busy() -> Path:
    """The file that says that this process builds."""
    assert ALONE[0] is not None
    return ALONE[0].with_name(f"{ALONE[0].name}.busy.{os.getpid()}")


def quiet(most: float = 150.0) -> None:
    """Waits until no process that times beside this one still builds: a user's call is Python's work as well."""
    if ALONE[0] is None:
        return
    busy().unlink(missing_ok=True)
    started = time.perf_counter()
    while any(ALONE[0].parent.glob(f"{ALONE[0].name}.busy.*")) and time.perf_counter() - started < most:
        time.sleep(0.5)


def generate(arm: Any, prompt: int, tokens: int) -> dict[str, Any]:
    """Milliseconds per token of a user's call, the prompt's included, after one that warms up."""
    quiet()
    arm.generate(prompt, tokens)
    times = []
    for _ in range(3):
        with alone(ALONE[0]):
            torch.cuda.synchronize()
            started = time.perf_counter()
            arm.generate(prompt, tokens)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / tokens)
    took = sorted(times)[1]
    return {"ms": round(took * 1e3, 4), "tokens_per_second": round(1 / took, 1)}


def labels(shape: Shape, arm: str) -> list[dict[str, Any]]:
    """What an arm is measured at."""
    linear = arm in LINEAR
    found = [{"what": "prefill", "tokens": length, "batch": 1} for length in PREFILL]
    for batch, context in DECODE:
        # A linear state is as large at any context: once a batch is enough.
        if not linear or context == min(c for b, c in DECODE if b == batch):
            found.append({"what": "decode", "tokens": context, "batch": batch})
    if arm in ("hf", "hybrid", *LINEAR[1:]):
        found.append({"what": "generate", "tokens": PROMPT, "batch": 1})
    return [{"model": shape.name, "arm": arm} | label for label in found]


def measure(shape: Shape, name: str, compiled: bool, end: float, save: Any) -> None:
    """All rows of one arm; ``save(row)`` after each."""
    wanted = labels(shape, name)
    built: dict[str, Any] = {}
    positions = max([*PREFILL, *(context for _, context in DECODE)]) + 1

    def build() -> dict[str, Any]:
        if time.perf_counter() > end:
            raise TimeoutError("no time left")
        gc.collect()  # the arm before
        torch.cuda.empty_cache()
        with torch.no_grad():
            built["arm"] = ARMS[name](shape, positions, compiled)
        return {}

    problem = guarded(build)
    for label in wanted:
        if problem:
            row = {"error": problem["error"]}
        elif time.perf_counter() > end:
            row = {"error": "no time left"}
        elif label["what"] == "prefill":
            row = guarded(lambda label=label: prefill(built["arm"], label["tokens"]))  # type: ignore[misc]
        elif label["what"] == "generate":
            row = guarded(lambda: generate(built["arm"], PROMPT, NEW))
        else:
            row = guarded(lambda label=label: decode(built["arm"], label["batch"], label["tokens"]))  # type: ignore[misc]
        trace = row.pop("traceback", problem.get("traceback"))
        if trace:
            print(trace, flush=True)
        save(label | row)
        gc.collect()
        torch.cuda.empty_cache()


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds ``÷ lincompile`` (how many times as long) to the other arms' rows."""
    for row in rows:
        for ours in rows:
            same = all(row[key] == ours[key] for key in ("model", "what", "batch"))
            length = row["what"] == "decode" or row["tokens"] == ours["tokens"]
            other = ours["arm"] == "lincompile" and row["arm"] != "lincompile"
            if other and same and length and ours.get("ms") and "ms" in row:
                row["÷ lincompile"] = round(row["ms"] / ours["ms"], 3)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each point, ms of every arm and how many times lincompile's the others take."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    points = list(dict.fromkeys((row["model"], row["what"], row["batch"], row["tokens"]) for row in rows))
    lines = ["| model | | batch | tokens | " + " | ".join(f"{arm}, ms" for arm in arms) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(arms))
    for model, what, batch, tokens in points:
        cells = []
        for arm in arms:
            mine = [r for r in rows if (r["model"], r["what"], r["batch"], r["arm"]) == (model, what, batch, arm)]
            exact = [r for r in mine if r["tokens"] == tokens]
            # A linear state is as large at any context.
            found = exact or (mine if what == "decode" and arm in LINEAR else [])
            ratio = f" ({found[0]['÷ lincompile']:.2f}×)" if found and "÷ lincompile" in found[0] else ""
            cells.append(f"{found[0]['ms']:.3g}{ratio}" if found and "ms" in found[0] else "not measured")
        lines.append(f"| {model} | {what} | {batch} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Prefill and, for one sequence, decode against tokens, on logarithmic axes."""
    panels = []
    for what in ("prefill", "decode"):
        panel = log_plot.Panel(f"{what}, one sequence", "tokens", "ms" if what == "prefill" else "ms a token")
        for model, arm in dict.fromkeys((row["model"], row["arm"]) for row in rows):
            found = [r for r in rows if (r["model"], r["arm"], r["what"], r["batch"]) == (model, arm, what, 1)]
            points = [(float(r["tokens"]), float(r["ms"])) for r in found if r.get("ms")]
            if len(points) == 1 and what == "decode":  # the same at any context
                contexts = sorted({float(r["tokens"]) for r in rows if r["what"] == "decode" and r["batch"] == 1})
                points = [(context, points[0][1]) for context in contexts]
            if points:
                panel.curves[f"{model} {arm}"] = points
        panels.append(panel)
    log_plot.save(panels, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="lincompile,hf,softmax", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--models", default="", help="indices into the list of shapes, e.g. 1,2; default all")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seconds", type=float, default=540, help="nothing is begun after this")
    parser.add_argument("--json", type=Path, default=Path("end_to_end.json"))
    parser.add_argument("--plot", type=Path, help="an .svg file")
    parser.add_argument("--alone", type=Path, help="a file that processes pass to one another to time one by one")
    parser.add_argument("--table", type=Path, nargs="+", help="earlier runs' files, put together instead of measuring")
    options = parser.parse_args()
    torch.manual_seed(0)
    ALONE[0] = options.alone
    if options.alone:
        busy().touch()
    shapes = [SHAPES[int(i)] for i in options.models.split(",")] if options.models else SHAPES
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions(), "rows": rows}
    if not options.table:
        result |= {"models": [asdict(shape) for shape in shapes], "dtype": str(arms_of.DTYPE), "steps": STEPS}

    def save(row: dict[str, Any] | None = None) -> None:
        if row:
            rows.append(row)
            print(json.dumps(row), flush=True)
        compare(rows)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")

    if options.table:
        result["runs"] = []
        for file in options.table:
            run = json.loads(file.read_text())
            rows += run.pop("rows")
            result["runs"].append({"file": file.name, **run})
        save()
    end = time.perf_counter() + options.seconds
    for shape in shapes if not options.table else ():
        for arm in options.arms.split(","):
            measure(shape, arm, not options.eager, end, save)
            torch._dynamo.reset()
    if options.alone:
        busy().unlink(missing_ok=True)
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
