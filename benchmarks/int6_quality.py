"""What six bits cost in quality: perplexity of a real model under every plan, and how well sensitivity predicts.

    python benchmarks/int6_quality.py MODEL --text wikitext2-test.txt --calibration corpus.txt --out result.json

MODEL is anything ``lincompile.load`` reads; with ``--adapter`` it is converted first, as ``lincompile MODEL --attn
lawcat --window 64 --adapter FILE`` does. Perplexity: non-overlapping windows, no BOS, the text's first
``--tokens`` tokens. Calibration text must not be the evaluation text. Plans share one calibration and run through the
emulation that the tests hold equal to the packed layers. ``flexq rule`` is that paper's code: eight-bit activations for
down_proj, six bits elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lincompile.passes import sensitivity
from lincompile.passes.capture import capture
from lincompile.passes.formats.load import load_model
from lincompile.passes.linear_layers import LinearLayer, find_linears
from lincompile.passes.program import Program
from lincompile.passes.quantize_plan import PlanOptions, choose
from lincompile.passes.schemes import SCHEMES, Scheme, parse_plan
from lincompile.passes.sensitivity import CodesOf
from lincompile.passes.weight_methods import Moments, WeightRounder

Plan = dict[str, Scheme]
# The strengths of smoothing that the pass uses by default, by plan.
STRENGTHS = {0.5: ("w6a8", "int6", "w8a8", "w6a16"), 1.0: ("w6a6", "flexq rule", "int6 at the rule's cost")}


def batch_of(program: Program, tokens: Tensor) -> dict[str, Tensor]:
    """The program's inputs for whole, unpadded sequences ``tokens [B, T]``."""
    values = {}
    for item in program.inputs:
        example = program.example[item.name]
        if item.role == "tokens":
            values[item.name] = tokens
        elif item.role == "positions":
            values[item.name] = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        else:
            values[item.name] = torch.ones(tokens.shape, dtype=example.dtype, device=tokens.device)
    return values


@torch.no_grad()
def perplexity(model: Callable[..., Tensor], program: Program, ids: Tensor, context: int) -> float:
    total, count = 0.0, 0
    for window in ids.split(context):
        if len(window) > 1:
            logits = model(**batch_of(program, window[None]))
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(total / count)


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def plan_perplexity(program: Program, layers: list[LinearLayer], plan: Plan, codes: CodesOf, ids: Tensor, context: int
                    ) -> float:  # fmt: skip
    on_linear = sensitivity.emulate(plan, codes, 128)
    return perplexity(lambda **batch: sensitivity.run(program, batch, layers, on_linear), program, ids, context)


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


def load_program(path: Path, device: str, adapter: Path | None) -> Program:
    if adapter is not None:
        from lincompile.lowering.compiler import compile

        options = {"attn": "lawcat", "window": 64, "adapter": str(adapter), "device": device}
        return compile(str(path), **options).program  # type: ignore[arg-type]
    loaded = load_model(path, device=device)
    return capture(loaded.module, loaded.example, prefix=loaded.prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="convert the model first")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20470)
    parser.add_argument("--calibration-batches", type=int, default=16)
    parser.add_argument("--calibration-context", type=int, default=1024)
    parser.add_argument("--score-batches", type=int, default=4, help="batches that choose and check plans")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=6, help="measure every n-th group alone for the correlation")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--moments", type=Path, help="the calibration's moments: read if the file is there, else saved")
    parser.add_argument("--plans", default="w6a8,int6,w6a6,flexq rule,int6 at the rule's cost,w8a8,w6a16")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    path = Path(arguments.model)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(path.parent if gguf else path, **gguf)

    def encode(text: Path) -> Tensor:
        ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
        return ids.to(arguments.device)

    ids = encode(arguments.text)[: arguments.tokens]
    calibration_ids = encode(arguments.calibration)
    started = time.time()
    program = load_program(path, arguments.device, arguments.adapter)
    size, count = arguments.calibration_context, arguments.calibration_batches
    stride = max(size, len(calibration_ids) // count)
    starts = range(0, min(stride * count, len(calibration_ids) - size + 1), stride)
    data = [batch_of(program, calibration_ids[s : s + size][None]) for s in starts]
    result: dict[str, Any] = {
        "model": path.name, "converted": arguments.adapter is not None, "text": arguments.text.name,
        "context": arguments.context, "tokens": len(ids), "method": arguments.method,
        "calibration": {"file": arguments.calibration.name, "tokens": len(data) * size},
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu", "torch": torch.__version__,
        "float": perplexity(program, program, ids, arguments.context), "plans": {},
    }  # fmt: skip
    print(f"float {result['float']:.4f} ({time.time() - started:.0f} s)", flush=True)
    todo = arguments.plans.split(",")
    moments = read_moments(arguments.moments, arguments, result)
    for strength, names in STRENGTHS.items():
        wanted = [name for name in names if name in todo]
        if not wanted:
            continue
        balanced = program.clone()
        everything = find_linears(balanced.graph_module)
        layers = [layer for layer in everything if layer.reason is None]
        rounder = WeightRounder(balanced, layers, arguments.method, data, 128, moments, compensate=True)
        if moments is None:
            moments = dict(rounder.moments())
            if arguments.moments is not None:
                torch.save({"of": moments_of(arguments, result), "moments": moments}, arguments.moments)
            print(f"moments ({time.time() - started:.0f} s)", flush=True)
        rounder.smooth(everything, strength)
        rule = {layer.name: SCHEMES["w6a8" if layer.name.endswith("down_proj") else "w6a6"] for layer in layers}
        few = data[: arguments.score_batches]
        for name in wanted:
            record: dict[str, Any] = {"smoothing": strength}
            if name.startswith("int6"):
                bits = average_bits(layers, rule) if "rule" in name else None
                options = PlanOptions(128, "fisher", arguments.method, bits, 1.25, None)
                plan, choice = choose(balanced, layers, parse_plan("int6"), few, options, rounder)
                record |= {key: choice[key] for key in ("kl", "predicted_kl")}
            else:
                plan = rule if "rule" in name else {layer.name: SCHEMES[name] for layer in layers}
            record["activation_bits"] = average_bits(layers, plan)
            record["perplexity"] = plan_perplexity(balanced, layers, plan, rounder, ids, arguments.context)
            record["change_percent"] = 100 * (record["perplexity"] / result["float"] - 1)
            result["plans"][name] = record
            print(name, json.dumps(record), f"({time.time() - started:.0f} s)", flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        if arguments.every:
            scheme = "w6a8" if strength < 1 else "w6a6"
            found = predicted_against_measured(balanced, data[:2], scheme, arguments.every, rounder)
            result.setdefault("sensitivity", []).append(found)
            print(json.dumps(found), f"({time.time() - started:.0f} s)", flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def average_bits(layers: list[LinearLayer], plan: Plan) -> float:
    weights = sum(layer.weights for layer in layers)
    return sum(plan[layer.name].activation_bits * layer.weights for layer in layers) / weights


if __name__ == "__main__":
    main()
