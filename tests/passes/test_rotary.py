"""Whether linear attention reads q and k before or after their rotary embedding is chosen, recorded, never missed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import lincompile
from lincompile.lowering.compiler import rewrite
from lincompile.lowering.options import Options
from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.distil.adapter import apply_adapter, save_adapter, settings_of
from lincompile.passes.distil.instrument import instead, model_inputs
from lincompile.passes.errors import LincompileError
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program

Proved = Callable[[str], SimpleNamespace]


def rewritten(model: SimpleNamespace, attn: str, rotary: str) -> Program:
    return Pipeline([LinearizeAttention(attn, rotary=rotary)])(model.program.clone())


@pytest.mark.parametrize("attn", ["lawcat", "hedgehog"])
def test_both_readings_are_recorded_and_differ(proved: Proved, attn: str) -> None:
    model = proved("llama-gqa")
    kept, removed = (rewritten(model, attn, rotary) for rotary in ("keep", "remove"))
    assert {site.details["rotary"] for site in kept.sites} == {"kept"}
    assert {site.details["rotary"] for site in removed.sites} == {"removed"}
    own = rewritten(model, attn, "")
    assert own.sites[0].details["rotary"] == ("kept" if attn == "hedgehog" else "removed")
    with torch.no_grad():
        a, b, c = (program(*model.example.values()) for program in (kept, removed, own))
    assert (a - b).norm() > 1e-3 * b.norm()
    assert torch.equal(c, a if attn == "hedgehog" else b)


@pytest.mark.parametrize("rotary", ["keep", "remove"])
def test_the_training_graph_reads_what_the_student_reads(proved: Proved, rotary: str) -> None:
    model = proved("llama-gqa")
    student = rewritten(model, "lawcat", rotary)
    with torch.no_grad():
        tokens = model.example[model.program.inputs[0].name]
        trained: Any = instead(model.program, student)(tokens)
        own = student(*model_inputs(student, tokens))
    torch.testing.assert_close(trained[0] if isinstance(trained, (list, tuple)) else trained, own, rtol=1e-4, atol=1e-5)


def test_a_model_without_positions_above_its_projections_has_none(proved: Proved) -> None:
    assert {site.details["rotary"] for site in rewritten(proved("gpt2"), "lawcat", "").sites} == {"none"}


class NormedAfter(nn.Module):
    """Attention whose q and k are normed after their rotary embedding, which can't be taken off from below."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def turned(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(
            2
        )
        half = torch.cat([-heads[..., 4:], heads[..., :4]], -1)
        return functional.layer_norm(heads * angles.cos() + half * angles.sin(), (8,))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        v = self.v(x).unflatten(-1, (4, 8)).transpose(1, 2)
        y = functional.scaled_dot_product_attention(self.turned(self.q(x)), self.turned(self.k(x)), v, is_causal=True)
        return y.transpose(1, 2).flatten(2) @ self.embed.weight.T


def test_positions_that_cannot_be_taken_off_are_refused_with_the_way_out() -> None:
    torch.manual_seed(0)
    program = lincompile.capture(NormedAfter().eval(), torch.randint(0, 40, (2, 11)))
    teacher = Pipeline([Canonicalize(), ProveAttention()])(program)
    assert teacher.sites[0].proved
    refused = Pipeline([LinearizeAttention("lawcat")])(teacher.clone()).sites[0]
    assert refused.method == "softmax"
    assert "positions enter above 'layer_norm" in refused.reason and "--rotary keep" in refused.reason
    kept = Pipeline([LinearizeAttention("lawcat", rotary="keep")])(teacher.clone()).sites[0]
    assert kept.method == "lawcat" and kept.details["rotary"] == "kept"


def test_an_adapter_brings_its_reading_and_refuses_the_other(proved: Proved, tmp_path: Path) -> None:
    model, file = proved("llama-gqa"), tmp_path / "a.safetensors"
    student = rewritten(model, "lawcat", "keep")
    save_adapter(file, model.program, student)
    assert settings_of(file).rotary == "keep"
    follows = rewrite(model.program, Options(adapter=str(file)))
    assert {site.details["rotary"] for site in follows.sites} == {"kept"}
    apply_adapter(file, model.program, follows)
    against = rewrite(model.program, Options(adapter=str(file), rotary="remove"))
    with pytest.raises(LincompileError, match="give --attn lawcat --rotary keep"):
        apply_adapter(file, model.program, against)
    with safe_open(str(file), "pt") as opened:
        metadata, tensors = dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    sites = {path: method.partition(" ")[0] for path, method in json.loads(metadata["sites"]).items()}
    save_file(tensors, str(file), metadata | {"format": "lincompile-adapter-1", "sites": json.dumps(sites)})
    with pytest.raises(LincompileError, match="is an adapter of format lincompile-adapter-1"):
        apply_adapter(file, model.program, follows)


def test_another_word_is_refused() -> None:
    with pytest.raises(LincompileError, match="--rotary sideways: the choices are keep and remove"):
        LinearizeAttention("lawcat", rotary="sideways")


class Rotated(nn.Module):
    """Attention with a norm on k, and rotary angles that are a product of positions and stored frequencies."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, width), nn.Linear(width, 50, bias=False)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.scale, self.heads = nn.Parameter(torch.ones(width // heads)), heads
        self.register_buffer("frequencies", 0.01 ** (torch.arange(4) / 4))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        x = (self.scale * x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)).transpose(1, 2)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def forward(self, idx: Tensor) -> Tensor:
        x = self.table(idx)
        positions = torch.arange(idx.shape[1])[None].expand(idx.shape)[..., None].float()
        angles = torch.cat([positions @ self.frequencies[None, :]] * 2, -1)[:, None]
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        q, k = self.turned(q, angles), self.turned(k, angles)
        y = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        result: Tensor = self.head(x + self.o(y.transpose(1, 2).flatten(2)))
        return result


@pytest.mark.parametrize("attn", ["lawcat", "gla"])
@pytest.mark.parametrize("rotary", ["keep", "remove"])
def test_gates_read_hidden_states_and_no_positions(attn: str, rotary: str) -> None:
    """The angles' product with stored frequencies is nearer to k than its projection, and no projection."""
    program = lincompile.capture(Rotated(), {"idx": torch.zeros(2, 9, dtype=torch.int64)})
    student = Pipeline([Canonicalize(), ProveAttention(), LinearizeAttention(attn, rotary=rotary)])(program)
    (site,) = student.sites
    assert site.method == attn, site.reason
    assert student.graph_module.get_submodule(site.details["module"]).shape.hidden == 32
