"""What six bits cost in quality: perplexity of a real model under every plan, before and after tuning.

Once, anywhere (token ids from all over a text, so that no GPU waits for a tokenizer)::

    python benchmarks/int6_quality.py MODEL --encode corpus.npy --calibration corpus-train.parquet
    python benchmarks/int6_quality.py MODEL --encode wikitext.npy --calibration wikitext2-test.txt --encode-tokens 0

Then on one H200, meant to take about two minutes each (``--seconds`` begins nothing later)::

    python benchmarks/int6_quality.py MODEL --device cuda --text wikitext.npy --calibration corpus.npy --tokens 0 \\
        --calibration-batches 64 --eval-batch 8 --every 0 --plans "w6a8,int6,w6a6,flexq rule" \\
        --tune codes --tune-steps 200 --tune-plans "w6a8,int6" --seconds 130 --out softmax.json
    python benchmarks/int6_quality.py MODEL … --adapter lawcat-window64.safetensors --out converted.json

MODEL is anything ``lincompile.load`` reads; with ``--adapter`` it is converted first, as ``lincompile MODEL --attn
lawcat --window 64 --adapter FILE`` does. Perplexity: non-overlapping windows, no BOS, the text's first ``--tokens``
tokens (0: all). Calibration text must not be the evaluation text. Plans share one calibration and run through the form
that tests hold equal to the packed layers, in float32. ``flexq rule`` is that paper's code: eight-bit activations for
down_proj, six bits elsewhere. The result is written after each part, with what it took; ``--seconds`` begins no part
after so long and lists those left out. ``--tune`` trains the stored numbers of each plan of ``--tune-plans`` on other
windows of the calibration text (``lincompile/passes/quantization/tune.py``); one window in eight is held out and judges
it. What a converted model learns from is the converted model in float, or the one it was converted from.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lincompile.lowering.compiler import prove, rewrite
from lincompile.lowering.options import Options
from lincompile.lowering.text import read_tokens
from lincompile.passes.capture import capture
from lincompile.passes.distil.adapter import apply_adapter
from lincompile.passes.distil.divergence import divergence
from lincompile.passes.formats.load import load_model
from lincompile.passes.inputs import model_values
from lincompile.passes.program import Program
from lincompile.passes.quantization import sensitivity
from lincompile.passes.quantization.linear_layers import LinearLayer, find_linears
from lincompile.passes.quantization.plan import PlanOptions, choose
from lincompile.passes.quantization.schemes import SCHEMES, Scheme, parse_plan
from lincompile.passes.quantization.sensitivity import CodesOf
from lincompile.passes.quantization.tune import TuneOptions, tune
from lincompile.passes.quantization.tuned_layers import Precision, find_parts, learn_by
from lincompile.passes.quantization.weight_methods import Moments, WeightRounder
from lincompile.passes.quantize import quantize_graph

Plan = dict[str, Scheme]
# The strengths of smoothing that the pass uses by default, by plan.
STRENGTHS = {0.5: ("w6a8", "int6", "w8a8", "w6a16"), 1.0: ("w6a6", "flexq rule", "int6 at the rule's cost")}


@torch.no_grad()
def perplexity(program: Program, ids: Tensor, context: int, batch: int) -> float:
    """Of whole windows ``batch`` at a time, then of the shorter last one."""
    whole = len(ids) // context * context
    groups = [*ids[:whole].view(-1, context).split(batch), ids[whole:][None]]  # type: ignore[no-untyped-call]
    total, count = torch.zeros((), dtype=torch.float64, device=ids.device), 0
    for tokens in groups:
        if tokens.numel() and tokens.shape[1] > 1:
            logits = program(**model_values(program, tokens))
            for row, wanted in zip(logits, tokens, strict=True):  # one window's float32 logits at a time
                total += torch.nn.functional.cross_entropy(row[:-1].float(), wanted[1:], reduction="sum").double()
            count += tokens.numel() - len(tokens)
    return math.exp(float(total) / count)


@torch.no_grad()
def kl(teacher: Program, program: Program, ids: Tensor, context: int, batch: int) -> float:
    """Nats per token by which the outputs diverge on whole windows, ``batch`` at a time."""
    groups = ids[: len(ids) // context * context].view(-1, context).split(batch)  # type: ignore[no-untyped-call]
    total = 0.0
    for tokens in groups:
        inputs = model_values(program, tokens)
        total += float(divergence(program(**inputs), teacher(**inputs))) * tokens.numel()
    return total / max(1, sum(tokens.numel() for tokens in groups))


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def predicted_against_measured(
    program: Program, data: list[dict[str, Tensor]], scheme: str, every: int, codes: CodesOf
) -> dict[str, Any]:
    """Spearman correlation, over groups of layers, of Fisher scores and the KL of quantizing that group alone."""
    layers = [layer for layer in find_linears(program.graph_module) if layer.reason is None]
    scores = sensitivity.measure(program, layers, [SCHEMES[scheme]], data, codes_of=codes)
    groups = sensitivity.groups_of(layers)[::every]
    plans = {str(i): {layer.name: SCHEMES[scheme] for layer in group} for i, group in enumerate(groups)}
    measured = sensitivity.divergence(program, layers, plans, data, codes, 128)
    predicted = [sum(scores.of(layer.name, scheme) for layer in group) for group in groups]
    return {
        "scheme": scheme,
        "groups": len(groups),
        "spearman": spearman(predicted, [measured[str(i)] for i in range(len(groups))]),
        "predicted_sum": sum(predicted),
        "measured_sum": sum(measured.values()),
    }


def moments_of(arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """What moments depend on: a file of others isn't read."""
    return {key: result[key] for key in ("model", "converted", "calibration", "method")} | {
        "context": arguments.calibration_context, "format": 2,
    }  # fmt: skip


def read_moments(path: Path | None, arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, Moments] | None:
    if path is None or not path.exists():
        return None
    record = torch.load(path, weights_only=False)
    if record["of"] != moments_of(arguments, result):
        raise SystemExit(f"{path} holds moments of {record['of']}: delete it or name another file")
    found: dict[str, Moments] = record["moments"]
    return found


def load_program(path: Path, device: str, adapter: Path | None) -> tuple[Program, Program, Any]:
    """The float program, the one that it was converted from (itself without an adapter), and the tokenizer."""
    loaded = load_model(path, device=device)
    program = capture(loaded.module, loaded.example, prefix=loaded.prefix)
    options = Options(attn="softmax") if adapter is None else Options(adapter=str(adapter), device=device)
    teacher = prove(program, options)
    if adapter is None:
        return teacher, teacher, loaded.tokenizer
    student = rewrite(teacher, options)
    apply_adapter(adapter, teacher, student, source_hash=loaded.source_hash)
    return student, teacher, loaded.tokenizer


def windows(program: Program, ids: Tensor, size: int, count: int) -> list[dict[str, Tensor]]:
    """``count`` windows of ``size`` tokens (or as many as there are) from all over the text."""
    stride = max(size, len(ids) // count)
    starts = range(0, min(stride * count, len(ids) - size + 1), stride)
    return [model_values(program, ids[start : start + size][None]) for start in starts]


def packed(balanced: Program, plan: Plan, codes: CodesOf) -> Program:
    """The program with its layers packed as planned."""
    student = balanced.clone()
    quantize_graph(student.graph_module, find_linears(student.graph_module), plan, codes)
    return student


def emulated(student: Program) -> Program:
    """A packed program that computes the same with plain products: no kernel's first use takes part."""
    twin = student.clone()
    weights = {name.removesuffix("_scale") for name, _ in student.graph_module.named_buffers()}
    learn_by(twin.graph_module, find_parts(student, weights, False, Precision()))
    return twin


class Run:
    """The result so far, written after each part with the seconds that each took."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.began = arguments, time.monotonic()
        self.result: dict[str, Any] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = round(time.monotonic() - started, 2)
        self.result.setdefault("seconds", {})[name] = took
        self.arguments.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print(f"{name}: {took} s ({time.monotonic() - self.began:.0f} s so far)", flush=True)

    def late(self, name: str) -> bool:
        """Whether there is no time left to begin a part, which is noted."""
        if self.arguments.seconds is None or time.monotonic() - self.began < self.arguments.seconds:
            return False
        self.result.setdefault("not_run", []).append(name)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="to evaluate on")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--encode", type=Path, metavar="FILE.npy", help="only write --calibration's token ids")
    parser.add_argument("--encode-tokens", type=int, default=4_000_000, help="at most so many, from all over (0: all)")
    parser.add_argument("--adapter", type=Path, help="convert the model first")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20470, help="of the text, 0: all")
    parser.add_argument("--eval-batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--kl-windows", type=int, default=16, help="windows of the text to measure the KL on")
    parser.add_argument("--calibration-batches", type=int, default=16)
    parser.add_argument("--calibration-context", type=int, default=1024)
    parser.add_argument("--score-batches", type=int, default=4, help="batches that choose and check plans")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=6, help="measure every n-th group alone for the correlation")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--moments", type=Path, help="the calibration's moments: read if the file is there, else saved")
    parser.add_argument("--plans", default="w6a8,int6,w6a6,flexq rule,int6 at the rule's cost,w8a8,w6a16")
    parser.add_argument("--tune", choices=("scales", "codes"))
    parser.add_argument("--tune-plans", help="by default all --plans")
    parser.add_argument("--tune-steps", type=int, default=200)
    parser.add_argument("--tune-batch", type=int, default=8, help="windows per step")
    parser.add_argument("--tune-tokens", type=int, help="by default as many as the steps read once")
    parser.add_argument("--tune-rate", type=float, default=1.0, help="times the rates that tuning chooses")
    parser.add_argument("--tune-teacher", choices=("converted", "original"), default="converted")
    parser.add_argument("--tune-compile", action="store_true", help="compile what lies between products (a minute)")
    parser.add_argument("--seconds", type=float, help="begin no part after so long")
    arguments = parser.parse_args()
    if arguments.encode is not None:
        encode(arguments)
        return
    if arguments.text is None or arguments.out is None:
        parser.error("--text and --out are needed")
    measure(arguments)


def encode(arguments: argparse.Namespace) -> None:
    import numpy as np

    loaded = load_model(Path(arguments.model))
    ids = read_tokens(str(arguments.calibration), loaded.tokenizer)
    count, piece = arguments.encode_tokens, 8192
    if count and len(ids) > count:
        stride = len(ids) // (count // piece)
        ids = torch.cat([ids[start : start + piece] for start in range(0, len(ids) - piece, stride)])
    np.save(arguments.encode, ids.numpy().astype("uint16" if int(ids.max()) < 1 << 16 else "int32"))
    print(f"{arguments.encode}: {len(ids):,} tokens")


def measure(arguments: argparse.Namespace) -> None:
    run = Run(arguments)
    path, result, todo = Path(arguments.model), run.result, arguments.plans.split(",")
    with run.part("load"):
        program, original, tokenizer = load_program(path, arguments.device, arguments.adapter)
        ids, text = (read_tokens(str(file), tokenizer) for file in (arguments.text, arguments.calibration))
        ids = ids[: arguments.tokens or None].to(arguments.device)
        text = text.to(arguments.device)
        size = arguments.calibration_context
        data = windows(program, text, size, arguments.calibration_batches)
    from_original = arguments.tune_teacher == "original"
    result |= {
        "model": path.name, "converted": arguments.adapter is not None, "text": arguments.text.name,
        "context": arguments.context, "tokens": len(ids), "method": arguments.method,
        "calibration": {"file": arguments.calibration.name, "tokens": len(data) * size},
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu", "torch": torch.__version__,
        "plans": {},
    }  # fmt: skip

    def evaluate(other: Program) -> dict[str, float]:
        some = ids[: arguments.kl_windows * arguments.context]
        found = perplexity(other, ids, arguments.context, arguments.eval_batch)
        measured = {"perplexity": found, "change_percent": 100 * (found / result["float"] - 1)}
        teachers = {"kl_on_text": program} | ({"kl_to_original": original} if from_original else {})
        return measured | {
            name: kl(teacher, other, some, arguments.context, arguments.eval_batch)
            for name, teacher in teachers.items()
        }

    with run.part("float"):
        result["float"] = perplexity(program, ids, arguments.context, arguments.eval_batch)
        if from_original:
            some = ids[: arguments.kl_windows * arguments.context]
            result["float_kl_to_original"] = kl(original, program, some, arguments.context, arguments.eval_batch)
    print(f"float {result['float']:.4f}", flush=True)
    moments = read_moments(arguments.moments, arguments, result)
    for strength, names in STRENGTHS.items():
        wanted = [name for name in names if name in todo and not run.late(name)]
        if not wanted:
            continue
        balanced = program.clone()
        everything = find_linears(balanced.graph_module)
        layers = [layer for layer in everything if layer.reason is None]
        rounder = WeightRounder(balanced, layers, arguments.method, data, 128, moments, compensate=True)
        if moments is None:
            with run.part("moments"):
                moments = dict(rounder.moments())
            if arguments.moments is not None:
                torch.save({"of": moments_of(arguments, result), "moments": moments}, arguments.moments)
        with run.part(f"rounding, smoothing {strength:g}"):
            rounder.smooth(everything, strength)
            for layer in layers:
                rounder(layer, SCHEMES["w6a8"])
        for name in wanted:
            if run.late(name):
                continue
            record: dict[str, Any] = {"smoothing": strength}
            with run.part(name):
                plan = plan_of(
                    name, balanced, layers, data[: arguments.score_batches], arguments.method, rounder, record
                )
                record["activation_bits"] = average_bits(layers, plan)
                student = packed(balanced, plan, rounder)
                record |= evaluate(emulated(student))
                result["plans"][name] = record
            print(name, json.dumps(record), flush=True)
            chosen = todo if arguments.tune_plans is None else arguments.tune_plans.split(",")
            if arguments.tune is None or name not in chosen or run.late(name + ", tuned"):
                continue
            with run.part(name + ", tuned"):
                teacher = original if from_original else balanced
                tuned = record["tuned"] = tuning(arguments, teacher, student, text)
            with run.part(name + ", perplexity after tuning"):
                tuned |= evaluate(emulated(student))
            print(name, "tuned", json.dumps(tuned), flush=True)
        if arguments.every and not run.late("sensitivity"):
            scheme = "w6a8" if strength < 1 else "w6a6"
            with run.part(f"sensitivity, smoothing {strength:g}"):
                found = predicted_against_measured(balanced, data[:2], scheme, arguments.every, rounder)
                result.setdefault("sensitivity", []).append(found)
            print(json.dumps(found), flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def plan_of(
    name: str, balanced: Program, layers: list[LinearLayer], few: list[dict[str, Tensor]], method: str,
    rounder: WeightRounder, record: dict[str, Any],
) -> Plan:  # fmt: skip
    rule = {layer.name: SCHEMES["w6a8" if layer.name.endswith("down_proj") else "w6a6"] for layer in layers}
    if not name.startswith("int6"):
        return rule if "rule" in name else {layer.name: SCHEMES[name] for layer in layers}
    bits = average_bits(layers, rule) if "rule" in name else None
    options = PlanOptions(128, "fisher", method, bits, 1.25, None)
    plan, choice = choose(balanced, layers, parse_plan("int6"), few, options, rounder)
    record |= {key: choice[key] for key in ("kl", "predicted_kl")}
    return plan


def tuning(arguments: argparse.Namespace, teacher: Program, student: Program, text: Tensor) -> dict[str, Any]:
    """Tune a packed program in place, on windows half a stride away from those that it was calibrated on."""
    options = TuneOptions(
        mode=arguments.tune, steps=arguments.tune_steps, batch=arguments.tune_batch, compile=arguments.tune_compile,
        rate=arguments.tune_rate,
    )  # fmt: skip
    size = arguments.calibration_context
    count = (arguments.tune_tokens or options.tokens(size)) // size
    weights = {name.removesuffix("_scale") for name, _ in student.graph_module.named_buffers()}
    shifted = text[min(size // 2, max(0, len(text) - 2 * size)) :]

    def say(step: int, expected: int, loss: float, rate: float) -> None:
        if step in (1, 2, 5) or step % 20 == 0:
            print(f"  step {step} of {expected}: KL {loss:.5f}, {rate:,.0f} tokens/s", flush=True)

    done = tune(teacher, student, weights, windows(teacher, shifted, size, count), options, progress=say)
    return done | {"rate": options.rate, "batch": options.batch, "teacher": arguments.tune_teacher}


def average_bits(layers: list[LinearLayer], plan: Plan) -> float:
    weights = sum(layer.weights for layer in layers)
    return sum(plan[layer.name].activation_bits * layer.weights for layer in layers) / weights


if __name__ == "__main__":
    main()
