"""Hedgehog's experiment in small: a GPT-2-architecture model trained from scratch with softmax, with Hedgehog from the
start, and converted from the softmax one; perplexity on held-out text.

    python benchmarks/hedgehog_gpt2.py TEXT --tokenizer MODEL.gguf --seconds 540 --json hedgehog_gpt2.json

TEXT is a .npy of token ids, or anything the CLI's --distil takes (then --tokenizer names a model that has one). The
softmax model is trained for a quarter of the time, the one with Hedgehog for as many steps on the same batches; the
conversion (attention weights' cross-entropy, then logits) has what is left. Every result is written as it comes, and
with --checkpoint a run that was stopped goes on with the step it had reached.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from versions import versions

from lincompile.lowering.text import read_corpus
from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.distil.data import TokenWindows
from lincompile.passes.distil.instrument import instead
from lincompile.passes.distil.logits import LogitDistillation, distil_logits, logits_of
from lincompile.passes.distil.loop import LoopOptions, LoopReport, Part, train
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.formats.load import load_model
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearization.methods import Hedgehog, SiteShape
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline

SOFTMAX_SHARE = 0.25  # of the time
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f}] {text}", flush=True)


class Block(nn.Module):
    """A GPT-2 block; its attention is softmax, or Hedgehog's."""

    def __init__(self, width: int, heads: int, hedgehog: bool) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        dim = width // heads
        shape = SiteShape(heads, heads, dim, dim, width, dim**-0.5, True)
        self.linear = Hedgehog(shape) if hedgehog else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        q, k, v = (part.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in self.qkv(hidden).chunk(3, -1))
        if self.linear is not None:
            mixed = self.linear(q, k, v, hidden)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2's architecture: learned positions, pre-norm blocks, tied embeddings."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int, hedgehog: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, hedgehog) for _ in range(layers))
        self.last = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:  # as GPT-2: what adds to the residual stream starts smaller with depth
            for name in ("out", "down"):
                nn.init.normal_(getattr(block, name).weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids ``[B, T]`` → logits ``[B, T, vocabulary]``."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.last(x), self.tokens.weight)


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], windows: Tensor, device: str) -> float:
    total = 0.0
    for window in windows:
        tokens = window[None].to(device)
        total += float(functional.cross_entropy(logits(tokens)[0, :-1].float(), tokens[0, 1:]))
    return math.exp(total / len(windows))


def fit(model: nn.Module, data: TokenWindows, options: LoopOptions, rate: float, checkpoint: Path | None) -> LoopReport:
    """Trains on the next token."""
    parameters = dict(model.named_parameters())
    device = next(model.parameters()).device
    last = [0.0]

    def losses_of(step: int) -> tuple[Tensor, int]:
        tokens = data.step(step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(tokens)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach().double().cpu()[None], tokens.numel()

    def progress(step: int, total: int, loss: float, speed: float) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            say(f"{step}/{total} loss {loss:.3f} {speed:,.0f} tokens/s")

    part = Part("the model", parameters, dict.fromkeys(parameters, rate))
    identity = {"data": data.fingerprint()}
    return train([part], losses_of, options, checkpoint=checkpoint, identity=identity, progress=progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--tokenizer", help="a model whose tokenizer reads TEXT")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=64, help="windows to measure on")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="folder for checkpoints")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()

    tokenizer = load_model(asked.tokenizer).tokenizer if asked.tokenizer else None
    corpus = read_corpus(asked.text, tokenizer)
    data = TokenWindows(corpus.ids, asked.length, asked.batch, asked.seed, 0.01, documents=corpus.documents)
    vocabulary = 64 * math.ceil((int(corpus.ids.max()) + 1) / 64)
    held_out = data.measure(asked.held_out)
    say(data.summary())
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()},
        "versions": versions(),
        "tokens_in_text": corpus.ids.numel(),
    }
    if asked.checkpoint:
        asked.checkpoint.mkdir(parents=True, exist_ok=True)

    def place(name: str) -> Path | None:
        return asked.checkpoint / f"{name}.ckpt" if asked.checkpoint else None

    def left(until: float) -> float:
        return max(1.0, asked.seconds * until - (time.monotonic() - BEGAN))

    def note(name: str, found: float, report: LoopReport) -> None:
        curve = report.losses[:: max(1, len(report.losses) // 100)]
        run = {key: value for key, value in asdict(report).items() if key != "losses"}
        result[name] = {"perplexity": found, "losses": curve, **run}
        if "softmax" in result:
            result[name]["ratio"] = found / result["softmax"]["perplexity"]
        say(f"{name}: perplexity {found:.2f} ({result[name]['ratio']:.3f}x) after {report.tokens:,} tokens")
        if asked.json:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    steps = None
    models: dict[str, nn.Module] = {}
    for name in ("softmax", "hedgehog"):
        torch.manual_seed(asked.seed)
        model = GPT2(vocabulary, asked.length, asked.width, asked.heads, asked.layers, name == "hedgehog")
        models[name] = model.to(asked.device)
        say(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        options = LoopOptions(steps=1 << 30, seconds=left(SOFTMAX_SHARE), weight_decay=0.1)
        if steps is not None:
            options = replace(options, steps=steps, seconds=None)
        report = fit(models[name], data, options, asked.rate, place(name))
        steps = report.steps
        note(name, perplexity(models[name], held_out, asked.device), report)

    softmax = models["softmax"].eval()
    teacher = Pipeline([Canonicalize(), ProveAttention()])(capture(softmax, {"idx": held_out[:2].to(asked.device)}))
    student = Pipeline([LinearizeAttention("hedgehog", seed=asked.seed)])(teacher.clone())
    rewritten = sum(site.method == "hedgehog" for site in student.sites)
    say(f"{rewritten} of {len(student.sites)} sites rewritten")
    options = Transfer(steps=1 << 30, seconds=left(1) / 2, loss="weights")
    moved = transfer(teacher, student, data, options, checkpoint=place("transfer"), note=say)
    say(f"transfer: {moved.steps} steps, relative error {mean(moved.before):.3f} -> {mean(moved.after):.3f}")
    note("transferred", perplexity(partial(logits_of, instead(teacher, student)), held_out, asked.device), moved)
    finish = LogitDistillation(steps=1 << 30, seconds=left(1))
    learnt = distil_logits(teacher, student, data, finish, checkpoint=place("logits"), note=say)
    note("converted", perplexity(partial(logits_of, instead(teacher, student)), held_out, asked.device), learnt)
    result["converted"]["divergence"] = [learnt.before, learnt.after]
    result["seconds"] = time.monotonic() - BEGAN
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def mean(errors: dict[str, float]) -> float:
    return sum(errors.values()) / len(errors)


if __name__ == "__main__":
    main()
