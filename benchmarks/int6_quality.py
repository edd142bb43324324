"""What six bits cost in quality: perplexity of a real model under every plan, and how well sensitivity predicts.

    python benchmarks/int6_quality.py MODEL --text wikitext2-test.txt --calibration corpus.txt --out result.json

MODEL is anything ``lincompile.load`` reads. Perplexity: non-overlapping windows, no BOS, the text's first ``--tokens``
tokens. Calibration text must not be the evaluation text. Every plan runs as the packed program that would ship, not as
an emulation. ``flexq rule`` is that paper's code: eight-bit activations for down_proj, six bits elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lincompile.passes import sensitivity
from lincompile.passes.capture import capture
from lincompile.passes.formats.load import load_model
from lincompile.passes.linear_layers import find_linears
from lincompile.passes.program import Program
from lincompile.passes.quantize import SCHEMES, Quantize


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
def perplexity(program: Program, ids: Tensor, context: int) -> float:
    total, count = 0.0, 0
    for window in ids.split(context):
        if len(window) > 1:
            logits = program(**batch_of(program, window[None]))
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(total / count)


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def predicted_against_measured(
    program: Program, data: list[dict[str, Tensor]], scheme: str, every: int
) -> dict[str, float]:
    """Spearman correlation, over groups of layers, of Fisher scores and the KL of quantizing that group alone."""
    layers = [layer for layer in find_linears(program.graph_module) if layer.reason is None]
    scores = sensitivity.measure(program, layers, [SCHEMES[scheme]], data)
    groups = sensitivity.groups_of(layers)[::every]
    plans = {str(i): {layer.name: SCHEMES[scheme] for layer in group} for i, group in enumerate(groups)}
    measured = sensitivity.divergence(program, layers, plans, data, sensitivity.rtn_codes(program, 128), 128)
    predicted = [sum(scores.of(layer.name, scheme) for layer in group) for group in groups]
    return {
        "scheme": scheme,  # type: ignore[dict-item]
        "groups": len(groups),
        "spearman": spearman(predicted, [measured[str(i)] for i in range(len(groups))]),
        "predicted_sum": sum(predicted),
        "measured_sum": sum(measured.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20470)
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--calibration-context", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=1, help="measure every n-th group alone for the correlation")
    parser.add_argument("--methods", default="rtn", help="comma-separated weight methods")
    parser.add_argument("--plans", default="", help="comma-separated names of the plans to run (default: all)")
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
    loaded = load_model(path, device=arguments.device)
    program = capture(loaded.module, loaded.example, prefix=loaded.prefix)
    size, count = arguments.calibration_context, arguments.calibration_batches
    stride = max(size, len(calibration_ids) // count)
    starts = range(0, min(stride * count, len(calibration_ids) - size + 1), stride)
    data = [batch_of(program, calibration_ids[s : s + size][None]) for s in starts]
    layers = [layer for layer in find_linears(program.graph_module) if layer.reason is None]
    weights = sum(layer.weights for layer in layers)
    rule = {layer.name: "w6a8" if layer.name.endswith("down_proj") else "w6a6" for layer in layers}
    rule_bits = sum(SCHEMES[rule[layer.name]].activation_bits * layer.weights for layer in layers) / weights
    result: dict[str, Any] = {
        "model": path.name, "text": arguments.text.name, "context": arguments.context, "tokens": len(ids),
        "calibration": {"file": arguments.calibration.name, "tokens": len(data) * size},
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu", "torch": torch.__version__,
        "float": perplexity(program, ids, arguments.context), "plans": {},
    }  # fmt: skip
    print(f"float {result['float']:.4f} ({time.time() - started:.0f} s)", flush=True)
    plans: dict[str, Quantize] = {name: Quantize(name) for name in ("w6a16", "w6a8", "w6a6", "w8a8")}
    plans["flexq rule"] = Quantize("w6a8", schemes=rule)
    plans["int6"] = Quantize("int6", calibration=data)
    plans["int6 at the rule's cost"] = Quantize("int6", calibration=data, activation_bits=rule_bits)
    plans["auto:6.5"] = Quantize("auto:6.5", calibration=data)
    for method in arguments.methods.split(","):
        if method != "rtn":
            plans |= {f"{name} {method}": Quantize(name, method=method, calibration=data) for name in ("w6a8", "int6")}
    wanted = [name for name in arguments.plans.split(",") if name]
    if unknown := set(wanted) - set(plans):
        parser.error(f"no plan called {', '.join(sorted(unknown))}; the plans are {', '.join(plans)}")
    for name, item in plans.items():
        if wanted and name not in wanted:
            continue
        record: dict[str, Any] = {}
        try:
            quantized = program.clone()
            report = item.run(quantized).report
            record["perplexity"] = perplexity(quantized, ids, arguments.context)
            record["change_percent"] = 100 * (record["perplexity"] / result["float"] - 1)
            record |= {key: report["totals"][key] for key in ("schemes", "bytes_per_weight", "layers")}
            choice = report.get("choice", {})
            record |= {key: choice[key] for key in ("kl", "predicted_kl", "activation_bits") if key in choice}
            del quantized
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
        result["plans"][name] = record
        print(name, json.dumps(record), f"({time.time() - started:.0f} s)", flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result["sensitivity"] = [
        predicted_against_measured(program, data[:4], scheme, arguments.every) for scheme in ("w6a6", "w6a8")
    ]
    print(json.dumps(result["sensitivity"]), f"({time.time() - started:.0f} s)", flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
