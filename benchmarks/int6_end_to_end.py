"""Decoding with packed weights, end to end on one NVIDIA GPU: tokens per second and memory of bf16, W8A8 and int6.

    python benchmarks/int6_end_to_end.py --out benchmarks/results/int6_end_to_end.json

Llama-shaped models with random weights (speed doesn't depend on them), built and quantized layer by layer on the device
by ``lincompile.quantize_``, so that no more than one layer is ever there in bf16. Every arm runs the same code: q, k
and v in one linear, gate and up in one, ``torch.compile`` around a layer, one CUDA graph around a token. Decoding is
greedy (the largest logit is looked for in blocks, then among theirs), one sequence, over a full key-value cache of
``--context`` positions. An untied output head is quantized too; a tied one, like every embedding, stays bf16, except in
the arm ``int6 embeddings``, where one copy of the planes serves both. In the arms ``int6`` and ``int6 embeddings``
norms, gated products and sums are part of the packed layers, a packed head's norm included, as the compiler's lowering
for GPUs makes them (``int6_layer``), and attention is ``softmax_attention``, the op that sites which stay softmax
become; in ``int6 apart`` they are left to ``torch.compile`` and SDPA, as in ``bf16`` and ``w8a8``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from end_to_end_arms import DTYPE, EPSILON, Layer, Shape
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile import W6A8, W8A8, quantize_
from lincompile.kernels.int6_linear import codes, pack

EMBEDDINGS = "int6 embeddings"
APART = "int6 apart"
ARMS = {"bf16": None, "w8a8": W8A8(), APART: W6A8(), "int6": W6A8(), EMBEDDINGS: W6A8()}
WHOLE = ("int6", EMBEDDINGS)  # with what surrounds the products inside them
BLOCK = 128  # logits whose largest is looked for first


SHAPES = [
    Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, True),
    Shape("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256, False),
]
DRY = {"SHAPES": [Shape("tiny", 2, 128, 4, 2, 32, 256, 128 * (1 + tied), tied) for tied in (False, True)]}


class Model(nn.Module):
    def __init__(self, shape: Shape, arm: str, context: int, device: str, compiled: bool) -> None:
        super().__init__()
        self.shape, self.whole, self.position = shape, arm in WHOLE, torch.tensor([context - 1], device=device)
        angles = (context - 1) * 10000.0 ** -torch.arange(0, 1, 2 / shape.head_dim, device=device)
        self.cos, self.sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        self.embedding: nn.Module = nn.Embedding(shape.vocabulary, shape.hidden, device=device, dtype=DTYPE)
        if arm == EMBEDDINGS:
            self.embedding = Table(self.embedding.weight)
        self.norm = nn.Parameter(torch.ones(shape.hidden, device=device, dtype=DTYPE))
        parts: list[nn.Module] = []
        for _ in range(shape.layers):
            parts.append(packed(Layer(shape, 1, context), arm))
            if self.whole:
                parts[-1] = Whole(parts[-1])
            if compiled:
                parts[-1].compile(fullgraph=True, dynamic=False)
        self.blocks = nn.ModuleList(parts)
        if not shape.tied:
            head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=device, dtype=DTYPE)
            self.head = packed(nn.Sequential(head), arm)
        self.choose = torch.compile(chosen, fullgraph=True, dynamic=False) if compiled else chosen

    def forward(self, token: Tensor) -> Tensor:
        x = self.embedding(token)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, self.position)
        if isinstance(self.embedding, Table) and self.shape.tied:
            return self.choose(whole(self.embedding.planes, x, norm=self.norm))
        if self.whole and not self.shape.tied:
            return self.choose(whole(planes(self.head[0]), x, norm=self.norm))
        x = F.rms_norm(x, (self.shape.hidden,), self.norm, EPSILON)
        return self.choose(F.linear(x, self.embedding.weight) if self.shape.tied else self.head(x))


def chosen(logits: Tensor) -> Tensor:
    """The place of the first largest logit ``[…]`` of ``[…, V]``, V a multiple of BLOCK.

    In two steps: argmax over all of a row takes one block of threads.
    """
    best, place = logits.unflatten(-1, (-1, BLOCK)).max(-1)
    block = best.argmax(-1, keepdim=True)
    return (block * BLOCK + place.gather(-1, block)).squeeze(-1)


Planes = tuple[Tensor, Tensor, Tensor]


def planes(part: Any) -> Planes:
    """What a packed linear layer stores."""
    return part.weight_hi, part.weight_lo, part.weight_scale


def whole(
    planes: Planes, x: Tensor, norm: Tensor | None = None, gated: bool = False, residual: Tensor | None = None
) -> Tensor:
    """A packed product with what surrounds it."""
    out: Tensor = torch.ops.lincompile.int6_layer(
        x, norm, EPSILON, gated, residual, *planes, None, pack.GROUP_SIZE, "a8"
    )
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token over a full cache."""
    out: Tensor = torch.ops.lincompile.softmax_attention(q, k, v, None, "full", 0, q.shape[-1] ** -0.5, 0.0)
    return out


class Whole(nn.Module):
    """A packed :class:`Layer` with what surrounds its products inside them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        layer = self.layer
        qkv = whole(planes(layer.qkv), x, norm=layer.norms[0])
        x = whole(planes(layer.o_proj), layer.attend(qkv, cos, sin, position, attention), residual=x)
        gate_up = whole(planes(layer.gate_up), x, norm=layer.norms[1])
        return whole(planes(layer.down), gate_up, gated=True, residual=x)


class Table(nn.Module):
    """An embedding in six bits, and the output head tied to it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scale = codes.quantize_weight(weight.detach().float())
        self.in_features = weight.shape[1]
        for name, plane in zip(("hi", "lo", "scale"), (*pack.pack(values), scale), strict=True):
            self.register_buffer(name, plane)

    @property
    def planes(self) -> Planes:
        return self.hi, self.lo, self.scale

    def forward(self, ids: Tensor) -> Tensor:
        return torch.ops.lincompile.int6_embedding(ids, *self.planes, self.in_features, pack.GROUP_SIZE, DTYPE)


def packed(module: nn.Module, arm: str) -> nn.Module:
    config = ARMS[arm]
    if config is not None:
        quantize_(module, config, filter_fn=lambda layer, name: True)
    return module.requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Parameters and packed buffers, without the caches."""
    tensors = [*model.parameters(), *(b for name, b in model.named_buffers() if not name.endswith(("keys", "values")))]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def measure(shape: Shape, arm: str, context: int, tokens: int, compiled: bool) -> dict[str, Any]:
    """One arm: memory after building, and the median of five runs of ``tokens`` replays."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    before, started = torch.cuda.memory_allocated(), time.time()
    model = Model(shape, arm, context, "cuda", compiled)
    record: dict[str, Any] = {"arm": arm, "weight_bytes": weight_bytes(model)}
    record["allocated_bytes"] = torch.cuda.memory_allocated() - before
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(token)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(model(token))
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(tokens):
            graph.replay()
        torch.cuda.synchronize()
        rates.append(tokens / (time.perf_counter() - begun))
    record["tokens_per_second"] = round(statistics.median(rates), 1)
    record["runs"] = [round(rate, 1) for rate in rates]
    record["seconds"] = round(time.time() - started, 1)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("int6_end_to_end.json"))
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--models", default="0,1", help="which of SHAPES, by number")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seconds", type=float, default=150, help="no arm is begun after this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    started = time.time()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "context": arguments.context,
        "compiled": not arguments.eager, "models": [],
    }  # fmt: skip
    for shape in [SHAPES[int(index)] for index in arguments.models.split(",") if int(index) < len(SHAPES)]:
        entry: dict[str, Any] = {"shape": asdict(shape), "arms": []}
        result["models"].append(entry)
        for arm in ARMS:
            if time.time() - started > arguments.seconds:
                entry["arms"].append({"arm": arm, "error": "no time left"})
                continue
            try:
                record = measure(shape, arm, arguments.context, arguments.tokens, not arguments.eager)
            except Exception as error:
                record = {"arm": arm, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            entry["arms"].append(record)
            base = entry["arms"][0]
            if "tokens_per_second" in record and "tokens_per_second" in base:
                record["speedup"] = round(record["tokens_per_second"] / base["tokens_per_second"], 3)
                record["memory_ratio"] = round(base["weight_bytes"] / record["weight_bytes"], 3)
            print(shape.name, json.dumps(record), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
