"""Whole models on one GPU: prefill and decode of LAWCAT attention on the fused kernels against softmax attention.

    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end.json --plot end_to_end.png --seconds 240

Llama-shaped models with random weights (speed doesn't depend on them), bfloat16, a layer under ``torch.compile``. Arms:

* lawcat: q, k, v → convolution, features, gate, linear attention, as ``lowering/triton.py`` puts them into a session;
* softmax: the same model with FlashAttention (SDPA), decoding over a full key-value cache;
* hf: the Hugging Face model with SDPA, its layers under ``torch.compile`` (prefill only).

Prefill: one sequence, logits of the last token, CUDA events, median. Decode: a whole step in one CUDA graph. Every row
is saved as soon as it is there; nothing is begun after ``--seconds``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_timing import guarded, milliseconds, recorded
from torch import Tensor, nn
from torch.nn import functional
from versions import versions

from lincompile.kernels import ops
from lincompile.passes.methods import GATE_TEMPERATURE, Lawcat, SiteShape

DTYPE = torch.bfloat16
BUDGET = 1.0


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


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
    "DECODE": ((1, 32), (2, 64)),
    "BUDGET": 0.001,
    "DTYPE": torch.float32,
}


class Layer(nn.Module):
    """A decoder layer. ``prefill``: all tokens at once; otherwise one token, on the state that the layer keeps."""

    def __init__(self, shape: Shape, arm: str, batch: int, context: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": "cuda", "dtype": DTYPE}
        self.arm, self.shape, self.prefill = arm, shape, context == 0
        self.sizes = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
        self.qkv = nn.Linear(shape.hidden, sum(self.sizes), **options)
        self.o_proj = nn.Linear(self.sizes[0], shape.hidden, **options)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, **options)
        self.down = nn.Linear(shape.intermediate, shape.hidden, **options)
        self.norms = nn.Parameter(torch.ones(2, shape.hidden, device="cuda", dtype=DTYPE))
        states: list[Tensor] = []
        if arm == "lawcat":
            dim = shape.head_dim
            site = SiteShape(shape.heads, shape.kv_heads, dim, dim, shape.hidden, dim**-0.5, True)
            self.method = Lawcat(site).cuda().to(DTYPE)
            taps = self.method.conv_q.weight.shape[1] - 1
            if not self.prefill:
                states = [
                    torch.randn(batch, heads * dim, taps, device="cuda", dtype=DTYPE)
                    for heads in (shape.heads, shape.kv_heads)
                ]
                states.append(torch.rand(batch, shape.kv_heads, 2 * dim, dim + 1, device="cuda"))
        elif not self.prefill:
            cache = (batch, shape.kv_heads, context, shape.head_dim)
            states = [torch.randn(cache, device="cuda", dtype=DTYPE) for _ in range(2)]
        for number, state in enumerate(states):
            self.register_buffer(f"state{number}", state, persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        h = functional.rms_norm(x, (self.shape.hidden,), self.norms[0])
        q, k, v = (
            part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for part in self.qkv(h).split(self.sizes, -1)
        )
        o = self.linear(q, k, v, h) if self.arm == "lawcat" else self.softmax(q, k, v, cos, sin, position)
        x = x + self.o_proj(o.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(functional.rms_norm(x, (self.shape.hidden,), self.norms[1])).chunk(2, dim=-1)
        out: Tensor = x + self.down(functional.silu(gate) * up)
        return out

    def linear(self, q: Tensor, k: Tensor, v: Tensor, h: Tensor) -> Tensor:
        m, old = self.method, [None] * 3 if self.prefill else [self.state0, self.state1, self.state2]
        weights = (m.map.weight, m.map.bias, None, False)
        features_q, state_q = ops.hedgehog_features(q, m.conv_q.weight, old[0], *weights)
        features_k, state_k = ops.hedgehog_features(k, m.conv_k.weight, old[1], *weights)
        z = functional.linear(h, m.gate.down)
        decay = ops.decay_gate(z, m.gate.up, m.gate.bias, None, self.shape.kv_heads, GATE_TEMPERATURE)
        out: Tensor
        out, state = ops.linear_attention(features_q, features_k, v, decay, old[2], 1.0, True, True)
        if not self.prefill:
            self.state0.copy_(state_q)
            self.state1.copy_(state_k)
            self.state2.copy_(state)
        return out

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.prefill:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        self.state0.index_copy_(2, position, k)
        self.state1.index_copy_(2, position, v)
        return functional.scaled_dot_product_attention(q, self.state0, self.state1, enable_gqa=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Model(nn.Module):
    """Token ids ``[B, T]`` to the next token of each row ``[B, 1]``; ``context`` 0 is prefill."""

    def __init__(self, shape: Shape, arm: str, batch: int, context: int, length: int) -> None:
        super().__init__()
        positions = torch.arange(length, device="cuda") if context == 0 else torch.tensor([context - 1], device="cuda")
        angles = positions[:, None] * 10000.0 ** -torch.arange(0, 1, 2 / shape.head_dim, device="cuda")
        self.cos, self.sin, self.position = angles.cos().to(DTYPE), angles.sin().to(DTYPE), positions[-1:]
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, device="cuda", dtype=DTYPE)
        self.norm = nn.Parameter(torch.ones(shape.hidden, device="cuda", dtype=DTYPE))
        self.layers = nn.ModuleList(Layer(shape, arm, batch, context) for _ in range(shape.layers))
        self.requires_grad_(False)

    def compiled(self) -> Model:
        for layer in self.layers:
            layer.compile(fullgraph=True, dynamic=False)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.position)
        x = functional.rms_norm(x[:, -1:], (x.shape[-1],), self.norm)
        return functional.linear(x, self.embedding.weight).argmax(dim=-1)


@torch.no_grad()
def prefill(shape: Shape, arm: str, length: int, compiled: bool) -> dict[str, Any]:
    """Milliseconds of one sequence, tokens per second, peak GiB beyond the weights."""
    tokens = torch.randint(0, shape.vocabulary, (1, length), device="cuda")
    run: Callable[[], Any]
    started = time.perf_counter()
    if arm == "hf":
        model = hugging_face(shape, length, compiled)
        run = lambda: model(tokens, use_cache=False, logits_to_keep=1).logits.argmax(-1)  # noqa: E731
    else:
        own = Model(shape, arm, 1, 0, length)
        own = own.compiled() if compiled else own
        run = lambda: own(tokens)  # noqa: E731
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    took = milliseconds(run, BUDGET)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30
    return {
        "ms": round(took, 3), "tokens_per_second": round(length / took * 1e3), "peak_gib": round(peak, 3),
        "weights_gib": round(base / 2**30, 2), "first_s": round(first, 1),
    }  # fmt: skip


def hugging_face(shape: Shape, length: int, compiled: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(DTYPE).eval()
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model


@torch.no_grad()
def decode(shape: Shape, arm: str, batch: int, context: int, compiled: bool) -> dict[str, Any]:
    """Milliseconds of a step in a CUDA graph, tokens per second, GiB of state."""
    model = Model(shape, arm, batch, context, 1)
    model = model.compiled() if compiled else model
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    took = milliseconds(recorded(lambda: token.copy_(model(token))).replay, BUDGET)
    state = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if "state" in name)
    return {
        "ms": round(took, 4), "tokens_per_second": round(batch / took * 1e3, 1), "state_gib": round(state / 2**30, 4)
    }  # fmt: skip


def jobs(shapes: list[Shape], arms: list[str], compiled: bool) -> list[tuple[dict[str, Any], Callable[[], Any]]]:
    """What to measure, the most telling first: (labels, function)."""
    found: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    for shape in shapes:
        for length in PREFILL:
            for arm in arms:
                label = {"model": shape.name, "what": "prefill", "arm": arm, "tokens": length, "batch": 1}
                found.append((label, lambda s=shape, a=arm, n=length: prefill(s, a, n, compiled)))  # type: ignore[misc]
        for batch, context in DECODE:
            for arm in arms:
                # A linear state is as large at any context: once a batch is enough.
                if arm == "hf" or (arm == "lawcat" and context != min(c for b, c in DECODE if b == batch)):
                    continue
                label = {"model": shape.name, "what": "decode", "arm": arm, "tokens": context, "batch": batch}
                run = lambda s=shape, a=arm, b=batch, c=context: decode(s, a, b, c, compiled)  # type: ignore[misc]  # noqa: E731
                found.append((label, run))
    return found


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds ``÷ lawcat`` (how many times as long) to the other arms' rows."""
    for row in rows:
        for ours in rows:
            same = all(row[key] == ours[key] for key in ("model", "what", "batch"))
            length = row["what"] == "decode" or row["tokens"] == ours["tokens"]
            if ours["arm"] == "lawcat" and row["arm"] != "lawcat" and same and length and "ms" in ours and "ms" in row:
                row["÷ lawcat"] = round(row["ms"] / ours["ms"], 3)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, what, key in ((axes[0], "prefill", "ms"), (axes[1], "decode", "ms")):
        for model, arm in dict.fromkeys((row["model"], row["arm"]) for row in rows):
            own = [
                r for r in rows if (r["model"], r["arm"], r["what"], r["batch"]) == (model, arm, what, 1) and key in r
            ]
            if own:
                axis.loglog([r["tokens"] for r in own], [r[key] for r in own], "o-", label=f"{model} {arm}")
        axis.set(title=f"{what}, one sequence", xlabel="tokens", ylabel="ms")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="lawcat,softmax,hf")
    parser.add_argument("--models", default="", help="indices into the list of shapes, e.g. 1,2; default all")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seconds", type=float, default=240, help="nothing is begun after this")
    parser.add_argument("--json", type=Path, default=Path("end_to_end.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = [SHAPES[int(i)] for i in options.models.split(",")] if options.models else SHAPES
    rows: list[dict[str, Any]] = []
    result = {"versions": versions(), "models": [asdict(shape) for shape in shapes], "rows": rows}
    started = time.perf_counter()
    for label, run in jobs(shapes, options.arms.split(","), not options.eager):
        left_out = time.perf_counter() - started > options.seconds
        row = label | ({"error": "no time left"} if left_out else guarded(run))
        row.pop("traceback", None)
        rows.append(row)
        compare(rows)
        print(json.dumps(row), flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        guarded(lambda: plot(rows, options.plot) or {})  # type: ignore[func-returns-value]
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
