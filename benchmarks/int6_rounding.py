"""What each part of the rounding of weights is worth, on a trained model small enough for any machine.

    python benchmarks/int6_rounding.py stories260K.bin --out result.json

The file is a checkpoint of llama2.c (first format, shared classifier). The model samples its own text: some sequences
to calibrate on, others to measure the divergence of the outputs from the float model's (nats per token). All linear
layers have six-bit weights, activations stay float; groups of 32, as the layers are narrow.

With ``--tune-steps N`` also W6A8 as it is, and after tuning scales and codes (``lincompile/passes/tune.py``) on further
sequences, each step on four.
"""

from __future__ import annotations

import argparse
import json
import struct
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lincompile.passes.capture import capture
from lincompile.passes.distil.divergence import divergence
from lincompile.passes.program import Program
from lincompile.passes.quantization import sensitivity
from lincompile.passes.quantization.linear_layers import find_linears
from lincompile.passes.quantization.schemes import SCHEMES
from lincompile.passes.quantization.sensitivity import Batch
from lincompile.passes.quantization.weight_methods import WeightRounder
from lincompile.passes.quantize import Quantize

GROUP = 32


def load(path: Path) -> LlamaForCausalLM:
    """The checkpoint as a Llama of transformers, whose rotary embedding pairs features half a head apart."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("7i", raw[:28])
    assert vocabulary > 0, "a classifier of its own isn't read here"
    values, position = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        size = torch.Size(shape).numel()
        position += size
        return values[position - size : position].view(shape)

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        return weight.view(count, -1, 2, dim).transpose(1, 2).reshape(weight.shape)

    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    kv = dim * kv_heads // heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    norms, parts = take(layers, dim), {}
    for name, shape in (("q", (dim, dim)), ("k", (kv, dim)), ("v", (kv, dim)), ("o", (dim, dim))):
        parts[f"self_attn.{name}_proj"] = take(layers, *shape)
    after = take(layers, dim)
    for name, shape in (("gate", (hidden, dim)), ("down", (dim, hidden)), ("up", (hidden, dim))):
        parts[f"mlp.{name}_proj"] = take(layers, *shape)
    state["model.norm.weight"] = take(dim)
    for index in range(layers):
        prefix = f"model.layers.{index}."
        state[prefix + "input_layernorm.weight"] = norms[index]
        state[prefix + "post_attention_layernorm.weight"] = after[index]
        for name, stacked in parts.items():
            count = heads if "q_proj" in name else kv_heads
            rotated = "q_proj" in name or "k_proj" in name
            state[f"{prefix}{name}.weight"] = halves(stacked[index], count) if rotated else stacked[index]
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["lm_head.weight"], (missing, unexpected)
    model.tie_weights()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=30, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=15)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tune-steps", type=int, default=0)
    parser.add_argument("--tune-sequences", type=int, default=320)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load(arguments.model)
    more = arguments.tune_sequences if arguments.tune_steps else 0
    count, length = arguments.sequences + arguments.held_out + more, arguments.length
    start = torch.ones(count, 1, dtype=torch.long)
    text = model.generate(start, do_sample=True, top_k=0, max_length=length, attention_mask=torch.ones_like(start))
    assert text.shape == (count, length)
    with torch.no_grad():  # a wrongly read checkpoint would find its own text no more likely than chance
        loss = float(model(text, labels=text).loss)
    assert loss < 2.5, loss
    model.config.use_cache = False
    program = capture(model, {"input_ids": text[:2]})
    name = program.inputs[0].name
    assert len(program.inputs) == 1
    data = [{name: part} for part in text[: arguments.sequences].split(5)]
    last = count - more
    unseen = [{name: part} for part in text[arguments.sequences : last].split(5)]
    layers = [layer for layer in find_linears(program.graph_module) if layer.reason is None]
    plan = {"plan": {layer.name: SCHEMES["w6a16"] for layer in layers}}
    result: dict[str, Any] = {
        "model": arguments.model.name, "layers": len(layers), "group_size": GROUP, "torch": torch.__version__,
        "calibration_tokens": arguments.sequences * length, "tokens": arguments.held_out * length,
        "own_text_nats_per_token": loss, "kl_nats_per_token": {},
    }  # fmt: skip
    moments = dict(WeightRounder(program, layers, "gptq", data, GROUP, compensate=True).moments())
    one_sided = {name: moment._replace(outputs=None) for name, moment in moments.items()}
    for label, method, known, compensate in (
        ("rtn", "rtn", None, False),
        ("clip", "clip", moments, False),
        ("gptq, inputs only", "gptq", one_sided, False),
        ("gptq, inputs only, compensated", "gptq", one_sided, True),
        ("gptq", "gptq", moments, False),
        ("gptq, compensated", "gptq", moments, True),
    ):
        began = time.process_time()
        rounder = WeightRounder(program, layers, method, data, GROUP, known, compensate=compensate)
        found = sensitivity.divergence(program, layers, plan, unseen, rounder, GROUP)["plan"]
        result["kl_nats_per_token"][label] = found
        print(f"{label}: {found:.6f} ({time.process_time() - began:.0f} s of processor time)", flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if more:
        result["w6a8"] = tuned(program, data, [{name: part} for part in text[last:].split(1)], unseen, arguments)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def tuned(
    program: Program,
    calibration: list[Batch],
    training: list[Batch],
    unseen: list[Batch],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """W6A8 by ``Quantize`` before and after tuning: the divergence on text that neither has seen."""
    record: dict[str, Any] = {}
    for mode in (None, "scales", "codes"):
        began, student = time.process_time(), program.clone()
        options = {"tune": mode, "tune_steps": arguments.tune_steps, "tune_batch": 4, "tune_data": training}
        pass_ = Quantize("w6a8", group_size=GROUP, calibration=calibration, **(options if mode else {}))  # type: ignore[arg-type]
        report = pass_.run(student).report
        with torch.no_grad():
            found = [float(divergence(student(**batch), program(**batch))) for batch in unseen]
        record[str(mode)] = {"kl_nats_per_token": sum(found) / len(found)} | (report["tuning"] if mode else {})
        print(f"w6a8, tuned: {mode}: {sum(found) / len(found):.6f} ({time.process_time() - began:.0f} s)", flush=True)
    return record


if __name__ == "__main__":
    main()
