"""The floor of decay gates is a part of what is trained: made, recorded, followed, and in every form of a program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import lincompile
from lincompile.cli import demo
from lincompile.lowering.compiler import rewrite
from lincompile.lowering.options import Options
from lincompile.passes.distil.adapter import Settings, apply_adapter, save_adapter, settings_of
from lincompile.passes.distil.instrument import run_of
from lincompile.passes.errors import LincompileError
from lincompile.passes.graph import aten
from lincompile.passes.linearization.methods import LOWEST, DecayGate
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.stateful import make_stateful

Proved = Callable[[str], SimpleNamespace]


def student(model: SimpleNamespace, attn: str = "lawcat", **options: Any) -> Program:
    """Every other feature forgets faster than a floor lets it."""
    program = Pipeline([LinearizeAttention(attn, **options)])(model.program.clone())
    with torch.no_grad():
        for name, parameter in program.graph_module.named_parameters():
            if name.endswith("gate.bias"):
                parameter[::2] = -40.0
    return program


def gates(program: Program) -> list[DecayGate]:
    return [module for module in program.graph_module.modules() if isinstance(module, DecayGate)]


def clamps(program: Program) -> list[float]:
    return [node.args[1] for node in program.graph_module.graph.nodes if node.target is aten.clamp.default]


@pytest.mark.parametrize(
    ("attn", "options", "floor"),
    [
        ("lawcat", {}, LOWEST),
        ("gla", {"lowest": -0.5}, -0.5),
        ("lawcat", {"lowest": None}, None),
        ("gated-delta", {}, None),
        ("hedgehog", {}, None),
    ],
)
def test_sites_say_and_compute_their_floor(
    proved: Proved, attn: str, options: dict[str, Any], floor: float | None
) -> None:
    model = proved("llama-gqa")
    plain = len(clamps(model.program))
    program = student(model, attn, **options)
    assert [site.details.get("lowest") for site in program.sites] == [floor] * 2
    assert {gate.lowest for gate in gates(program)} <= {floor}
    found = clamps(program)
    assert len(found) - plain == (0 if floor is None else 2) and found.count(floor) == len(found) - plain


def test_zero_is_no_floor() -> None:
    for make in (lambda: LinearizeAttention("gla", lowest=0.0), Options(lowest=0.0).check):
        with pytest.raises(LincompileError, match=r"so lowest=0.0 must be below 0 \(None = no floor\)"):
            make()


@pytest.mark.parametrize("attn", ["lawcat", "gla"])
def test_steps_and_padding_at_the_floor(proved: Proved, attn: str) -> None:
    model = proved("llama-gqa")
    program, free = student(model, attn), student(model, attn, lowest=None)
    step = make_stateful(program)
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) >= torch.tensor([[0], [4]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    parts, states = [], step.initial_states(2)
    with torch.no_grad():
        for cut in (slice(0, 7), slice(7, 8), slice(8, 12)):
            logits, states = step(tokens[:, cut], positions[:, cut], mask[:, cut], states)
            parts.append(logits)
        whole, other = (logits_of(item, tokens, mask, positions) for item in (program, free))
    together = torch.cat(parts, 1)
    torch.testing.assert_close(together[mask], whole[mask], rtol=1e-4, atol=1e-5)
    assert float((whole - other)[mask].abs().max()) > 1e-4, "what would forget faster is held at the floor"


def logits_of(program: Program, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    values = {"mask": mask, "positions": positions, "tokens": tokens}
    given = {
        item.name: values[item.role].to(program.placeholder(item.name).meta["val"].dtype) for item in program.inputs
    }
    result = program(**given)
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("lowest", [LOWEST, -0.3, None])
def test_an_adapter_brings_its_floor_and_refuses_another(proved: Proved, tmp_path: Path, lowest: float | None) -> None:
    model, file = proved("llama-gqa"), tmp_path / "a.safetensors"
    save_adapter(file, model.program, student(model, lowest=lowest))
    assert settings_of(file).lowest == lowest
    follows = rewrite(model.program, Options(adapter=str(file), lowest=-2.0))
    assert [gate.lowest for gate in gates(follows)] == [lowest] * 2
    apply_adapter(file, model.program, follows)
    against = student(model, lowest=-2.0)
    with pytest.raises(LincompileError, match=rf"give --attn lawcat \(in Python, lowest={lowest}\)$"):
        apply_adapter(file, model.program, against)


def test_sites_without_the_word_have_no_floor() -> None:
    found = Settings.of({"a": "lawcat+64 kept", "b": "softmax"})
    assert found.lowest is None and found.rotary == "keep"
    found = Settings.of({"a": "gla none", "b": "gla+8 removed floor -1.0"})
    assert (found.attn, found.window, found.rotary, found.lowest) == ("gla", 8, "remove", -1.0)


@pytest.mark.parametrize("file", sorted(demo.DATA.glob("*.safetensors")), ids=lambda file: file.stem)
def test_shipped_adapters_bring_the_floor_that_they_were_trained_with(file: Path) -> None:
    """The one with softmax layers was trained before gates had a floor."""
    trained_with = None if file.stem.endswith("softmax6") else LOWEST
    assert Options(adapter=str(file)).followed().lowest == trained_with


def test_a_run_with_another_floor_is_another_run(proved: Proved) -> None:
    model = proved("llama-gqa")
    runs = [run_of("logits", {}, student(model, lowest=lowest), None) for lowest in (LOWEST, None)]
    assert runs[0] != runs[1]


def test_a_module_is_given_its_floor() -> None:
    module, example = zoo.build("nanogpt")
    lincompile.linearize_(module, "lawcat", example=example, lowest=-0.5)
    assert {gate.lowest for gate in module.modules() if isinstance(gate, DecayGate)} == {-0.5}
