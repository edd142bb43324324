"""Distils a model to linear attention on a GPU and measures it: loads, proves, rewrites, transfers, distils, evaluates.

    python benchmarks/distil.py MODEL --train TEXT --eval NAME=TEXT --transfer-seconds 120 --logit-seconds 240 \
        --adapter lawcat.safetensors --json distil-lawcat.json

TEXT is a .npy of token ids, a .json list of documents, or anything the CLI's --distil takes. Perplexity is over
non-overlapping windows without BOS (as ``lincompile eval``), in float32 on a CPU and with bfloat16 products on a GPU,
teacher and student by the same code; the student measured is one rebuilt from the adapter, where one is written.
With --evaluate ADAPTER nothing is trained.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from versions import versions

from lincompile.lowering.compiler import Options, capture_loaded, rewrite
from lincompile.lowering.text import read_tokens
from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.distil.adapter import apply_adapter, save_adapter
from lincompile.passes.distil.choose import choose
from lincompile.passes.distil.data import TokenWindows
from lincompile.passes.distil.instrument import TrainingGraph, instead, unpadded
from lincompile.passes.distil.logits import LogitDistillation, distil_logits, logits_of
from lincompile.passes.distil.recipe import with_branches_of
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.formats.load import load_model
from lincompile.passes.identity import ProveAttention
from lincompile.passes.methods import Shares
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program

ABLATION_TOKENS = 40_960  # of each text
RESERVE = 30.0  # seconds for the adapter and the evaluation after it
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f}] {text}", flush=True)


def tokens_of(source: str, loaded: Any) -> Tensor:
    if not source.endswith(".json"):
        return read_tokens(source, loaded.tokenizer)
    import tempfile

    from tokenizers import Tokenizer

    documents = json.loads(Path(source).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        loaded.tokenizer(Path(folder))
        codec = Tokenizer.from_file(f"{folder}/tokenizer.json")
    pieces = codec.encode_batch([document + "\n\n" for document in documents])
    return torch.tensor([i for piece in pieces for i in piece.ids], dtype=torch.int32)


@torch.no_grad()
def perplexity(graph: TrainingGraph, ids: Tensor, context: int, limit: int | None) -> dict[str, float]:
    """Non-overlapping windows, each predicting its tokens but the first; the last may be shorter."""
    total, count = 0.0, 0
    for start in range(0, len(ids) if limit is None else min(limit, len(ids)), context):
        window = ids[start : start + context].long()[None].to(graph.device)
        if window.shape[1] < 2:
            break
        logits = logits_of(graph, window)[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").double())
        count += window.shape[1] - 1
    return {"perplexity": math.exp(total / count), "nll": total / count, "tokens": count}


def evaluate(graph: TrainingGraph, texts: dict[str, Tensor], context: int, limit: int | None) -> dict[str, Any]:
    return {name: perplexity(graph, ids, context, limit) for name, ids in texts.items()}


def progress(name: str, every: float = 10.0) -> Any:
    last = [0.0]

    def show(step: int, total: int, loss: float, rate: float) -> None:
        if time.monotonic() - last[0] > every:
            last[0] = time.monotonic()
            say(f"{name} {step}/{total} loss {loss:.4f} {rate:,.0f} tokens/s")

    return show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--attn", default="lawcat")
    parser.add_argument("--keep-softmax", default=None, help="as in the CLI; auto:N chooses by KL after the transfer")
    parser.add_argument("--train", help="text to train on; leave it out to measure --evaluate")
    parser.add_argument("--evaluate", type=Path, metavar="ADAPTER", help="only measure what an adapter makes")
    parser.add_argument("--eval", action="append", default=[], metavar="NAME=TEXT")
    parser.add_argument("--transfer-seconds", type=float, default=120)
    parser.add_argument("--logit-seconds", type=float, default=240)
    parser.add_argument("--until", type=float, help="cut the second stage short so that all is written by this second")
    parser.add_argument("--mode", default="lora:16", help="full or lora:R")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--transfer-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=None, help="evaluate on so many tokens of each text")
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument(
        "--window", type=int, default=None, help="softmax over the nearest tokens beside the linear part"
    )
    parser.add_argument("--logit-length", type=int, default=None, help="tokens per window of the second stage")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--start", type=Path, metavar="ADAPTER", help="begin from an adapter, without a transfer")
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True, help="with a window")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()

    loaded = load_model(asked.model, dtype=torch.float32, device=asked.device)
    say(f"loaded {asked.model}")
    program = capture_loaded(loaded)
    say("captured")
    teacher = Pipeline([Canonicalize(), ProveAttention()])(program)
    say(f"proved {sum(site.proved for site in teacher.sites)} of {len(teacher.sites)} sites")
    keep = asked.keep_softmax
    automatic = int(keep[5:]) if keep and keep.startswith("auto:") else 0
    options = Options(attn=asked.attn, keep_softmax=None if automatic else keep, window=asked.window, seed=asked.seed)
    student = rewrite(teacher, options)
    if (asked.train is None) == (asked.evaluate is None):
        parser.error("give --train TEXT, or --evaluate ADAPTER")
    texts = {name: tokens_of(path, loaded) for name, path in (item.split("=", 1) for item in asked.eval)}
    say(f"rewritten; {', '.join(f'{len(v):,} tokens of {k}' for k, v in texts.items())}")

    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()},
    }
    result["versions"] = versions()
    result["teacher"] = evaluate(unpadded(teacher), texts, asked.context, asked.limit)
    say(f"teacher {summary(result['teacher'])}")
    if asked.evaluate:
        result["adapter"] = apply_adapter(asked.evaluate, teacher, student, source_hash=loaded.source_hash)
        result["student"] = evaluate(instead(teacher, student), texts, asked.context, asked.limit)
        say(f"student {summary(result['student'], result['teacher'])}")
        write(asked.json, result)
        ablate(result, teacher, student, texts, asked)
        write(asked.json, result)
        return

    ids = tokens_of(asked.train, loaded)
    say(f"{len(ids):,} tokens to train on")
    data = TokenWindows(ids, asked.length, asked.transfer_batch, asked.seed, held_out=0.005)
    tokens = 0
    if asked.start:
        result["start"] = apply_adapter(asked.start, teacher, student, source_hash=loaded.source_hash)
        tokens = int(result["start"].get("tokens", 0))
    else:
        chosen = Transfer(steps=1 << 30, seconds=asked.transfer_seconds, compile=asked.compile)
        moved = transfer(teacher, student, data, chosen, progress=progress("transfer"), note=say)
        result["transfer"] = thin(asdict(moved))
        before, after = (sum(d.values()) / len(d) for d in (moved.before, moved.after))
        say(f"transfer: relative error {before:.3f} -> {after:.3f}, {moved.tokens:,} tokens, {moved.seconds:.0f} s")
        tokens = moved.tokens
        if asked.adapter:  # what there is if the next stage is cut off
            partial = asked.adapter.with_suffix(".transfer.safetensors")
            save_adapter(partial, teacher, student, source_hash=loaded.source_hash, record={"tokens": tokens})
    result["after_transfer"] = evaluate(instead(teacher, student), texts, asked.context, asked.limit)
    say(f"after transfer {summary(result['after_transfer'], result['teacher'])}")
    write(asked.json, result)

    if automatic:
        choice = choose(teacher, student, data.measure(8), automatic)
        result["choice"] = asdict(choice)
        say(f"kept softmax: {choice.kept}; KL {choice.linear:.3f} -> {choice.chosen:.3f}")
        options = replace(options, keep_softmax=",".join(map(str, choice.kept)) + ",")
        student = with_branches_of(student, rewrite(teacher, options))

    data = TokenWindows(ids, asked.logit_length or asked.length, asked.batch, asked.seed + 1, held_out=0.005)
    rates = {} if asked.rate is None else {"rate": asked.rate, "lora_rate": asked.rate}
    seconds = asked.logit_seconds
    if asked.until is not None:
        seconds = max(0.0, min(seconds, asked.until - (time.monotonic() - BEGAN) - RESERVE))
    stage = LogitDistillation(steps=1 << 30, seconds=seconds, train=asked.mode, compile=asked.compile, **rates)
    learnt = distil_logits(teacher, student, data, stage, progress=progress("logits"), note=say)
    result["logits"] = thin(asdict(learnt))
    say(f"logits: KL {learnt.before:.3f} -> {learnt.after:.3f}, {learnt.tokens:,} tokens, {learnt.seconds:.0f} s")
    write(asked.json, result)
    if asked.adapter:
        record = {k: result[k] for k in ("options", "versions")} | {"tokens": tokens + learnt.tokens}
        save_adapter(asked.adapter, teacher, student, source_hash=loaded.source_hash, record=record)
        student = rewrite(teacher, options)
        apply_adapter(asked.adapter, teacher, student, source_hash=loaded.source_hash)
        say(f"adapter of {asked.adapter.stat().st_size:,} bytes")
    result["student"] = evaluate(instead(teacher, student), texts, asked.context, asked.limit)
    say(f"student {summary(result['student'], result['teacher'])}")
    write(asked.json, result)
    ablate(result, teacher, student, texts, asked)
    result["seconds"] = time.monotonic() - BEGAN
    write(asked.json, result)


def ablate(
    result: dict[str, Any], teacher: Program, student: Program, texts: dict[str, Tensor], asked: argparse.Namespace
) -> None:
    """What the window and the linear attention do alone, where there are both."""
    if not asked.window or not asked.ablations:
        return
    result["ablations"] = {}
    for name, far, near in (("window only", 0, 1), ("linear only", 1, 0), ("no attention", 0, 0)):
        with shares_times(far, near):
            limit = asked.limit or ABLATION_TOKENS
            result["ablations"][name] = evaluate(instead(teacher, student), texts, asked.context, limit)
        say(f"{name} {summary(result['ablations'][name])}")


@contextlib.contextmanager
def shares_times(far: float, near: float) -> Iterator[None]:
    """Multiplies the shares of the linear attention and of the window, of every site."""
    plain = Shares.forward

    def scaled(self: Shares, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = plain(self, x)
        return shares[0] * far, shares[1] * near

    Shares.forward = scaled  # type: ignore[method-assign]
    try:
        yield
    finally:
        Shares.forward = plain  # type: ignore[method-assign]


def summary(result: dict[str, Any], teacher: dict[str, Any] | None = None) -> str:
    def one(name: str) -> str:
        value = result[name]["perplexity"]
        ratio = f" ({value / teacher[name]['perplexity']:.3f}x)" if teacher else ""
        return f"{name} {value:.3f}{ratio}"

    return ", ".join(map(one, result))


def thin(report: dict[str, Any], points: int = 200) -> dict[str, Any]:
    """The report with its loss curve averaged into at most ``points`` values."""
    losses = report["losses"]
    size = max(1, math.ceil(len(losses) / points))
    report["losses"] = [round(sum(p) / len(p), 5) for p in (losses[i : i + size] for i in range(0, len(losses), size))]
    report["losses_averaged_over"] = size
    return report


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
