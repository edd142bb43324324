"""A step program written by hand, small enough to read: one linear site, one softmax site, one sliding softmax site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exported_models import Exported, export_case
from torch import Tensor, nn
from torch.fx import GraphModule

from lincompile.kernels import ops  # noqa: F401
from lincompile.passes.stateful import StateSpec, StepProgram

WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW, MAX_POSITIONS = 24, 3, 1, 8, 40, 4, 64
LINEAR, FULL, SLIDING = "layers.0.attention", "layers.1.attention", "layers.2.attention"


class ToyStep(nn.Module):
    """``(tokens, positions, mask, *states) -> (logits, *states)`` with tied embeddings and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(MAX_POSITIONS, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(HEADS * HEAD_DIM, WIDTH) for _ in range(3))
        self.conv = nn.Parameter(torch.randn(KV_HEADS * HEAD_DIM, 3))
        self.gate = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("temper", torch.tensor(0.8), persistent=False)

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        q, k, v = self.qkv[layer](x).split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
        return (
            q.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2),
            k.view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2),
            v.view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2),
        )

    def merge(self, layer: int, x: Tensor, o: Tensor) -> Tensor:
        return x + self.out[layer](o.transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        seen, conv, state, k1, v1, k2, v2 = states
        seen = torch.cat([seen, mask], 1)
        x = self.embedding(tokens) + self.positions(positions)
        real = mask[:, None, :, None].to(x.dtype)

        q, k, v = self.heads(0, x)
        batch, _, length, _ = k.shape
        flat = (k * real).transpose(1, 2).reshape(batch, length, KV_HEADS * HEAD_DIM)
        flat, conv = torch.ops.lincompile.short_conv(flat, self.conv, conv)
        k = flat.view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2).softmax(-1) * real
        decay = nn.functional.logsigmoid(self.gate(x)).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2) * real
        o, state = torch.ops.lincompile.linear_attention(q.softmax(-1), k, v, decay, state, 1.0, True, True)
        x = self.merge(0, x, o)

        q, k, v = self.heads(1, x)
        step = torch.ops.lincompile.softmax_attention_step
        o, k1, v1 = step(q, k, v, k1, v1, seen, "causal", 0, HEAD_DIM**-0.5, 0.0)
        x = self.merge(1, x, o)
        q, k, v = self.heads(2, x)
        o, k2, v2 = step(q, k, v, k2, v2, seen, "sliding", WINDOW, HEAD_DIM**-0.5, 0.0)
        x = self.merge(2, x, o)
        return (self.head(x) * self.temper, seen, conv, state, k1, v1, k2, v2)


def state_specs() -> list[StateSpec]:
    """One spec per state, in the order of ``ToyStep``'s arguments."""
    return [
        StateSpec("mask", "", "mask", (None,), torch.bool),
        StateSpec("0.conv", LINEAR, "conv", (KV_HEADS * HEAD_DIM, 2), torch.float32),
        StateSpec("0.state", LINEAR, "recurrent", (KV_HEADS, HEAD_DIM, HEAD_DIM + 1), torch.float32),
        StateSpec("1.key", FULL, "key", (KV_HEADS, None, HEAD_DIM), torch.float32),
        StateSpec("1.value", FULL, "value", (KV_HEADS, None, HEAD_DIM), torch.float32),
        StateSpec("2.key", SLIDING, "key", (KV_HEADS, None, HEAD_DIM), torch.float32),
        StateSpec("2.value", SLIDING, "value", (KV_HEADS, None, HEAD_DIM), torch.float32),
    ]


SITES = [
    {"path": LINEAR, "kind": "causal", "window": None, "method": "lawcat", "verdict": "rewrite", "reason": "proved"},
    {"path": FULL, "kind": "causal", "window": None, "method": "softmax", "verdict": "keep", "reason": "asked for"},
    {"path": SLIDING, "kind": "sliding", "window": WINDOW, "method": "softmax", "verdict": "keep", "reason": "window"},
]


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The toy: its ``step`` program, the program's ``graph_module`` and ``states``, and ``sites`` for a manifest."""
    torch.manual_seed(7)
    module = ToyStep().eval().requires_grad_(False)
    dynamic = torch.export.Dim.DYNAMIC
    example = [torch.zeros(2, 3, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool)]
    axes = [{0: dynamic, 1: dynamic}] * 3
    states = state_specs()
    for spec in states:
        example.append(torch.zeros(2, *(5 if size is None else size for size in spec.shape), dtype=spec.dtype))
        axes.append({0: dynamic} | {i + 1: dynamic for i, size in enumerate(spec.shape) if size is None})
    exported = torch.export.export(
        module, tuple(example), dynamic_shapes=(axes[0], axes[1], axes[2], tuple(axes[3:])), strict=False
    )
    traced = exported.module(check_guards=False)
    graph_module = GraphModule(traced, traced.graph)
    graph_module.graph.set_codegen(torch.fx.graph.CodeGen())
    graph_module.recompile()
    step = StepProgram(graph_module, states, {SLIDING: WINDOW}, MAX_POSITIONS)
    return SimpleNamespace(step=step, graph_module=graph_module, states=states, sites=SITES)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """``exported(name)``: a case of ``exported_models``, exported once."""
    cache: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in cache:
            cache[name] = export_case(name, tmp_path_factory.mktemp(name))
        return cache[name]

    return get


def write_word_tokenizer(folder: Path) -> None:
    """A tokenizer of the toy's vocabulary, one word ``w7`` per id, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    words = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}w2 {{ message.content }} {% endfor %}w3"
    tokenizer.save_pretrained(folder)
