"""Layers that make up for the rounding of those before them: which can, and that it helps on tokens never seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.kernels.int6_linear.codes import dequantize
from lincompile.passes.capture import capture
from lincompile.passes.quantization.compensate import find_parts, replay
from lincompile.passes.quantization.linear_layers import find_linears
from lincompile.passes.quantization.schemes import SCHEMES
from lincompile.passes.quantization.weight_methods import WeightRounder
from lincompile.passes.quantize import Quantize


class Gated(nn.Module):
    """``other``: what else is read, the hidden features of ``up`` or the input."""

    def __init__(self, width: int = 64, hidden: int = 96, other: str = "") -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        y: Tensor = self.down(F.silu(self.gate(x)) * up)
        return y + up.mean(-1, keepdim=True) if self.other == "up" else x + y if self.other == "x" else y


def parts_of(model: nn.Module, x: Tensor) -> dict[str, list[str]]:
    program = capture(model.eval(), x)
    parts = find_parts(find_linears(program.graph_module))
    return {name: sorted(maker.name for maker in part.makers) for name, part in parts.items()}


def test_makers_are_read_by_nothing_else() -> None:
    x = torch.randn(2, 5, 64)
    assert parts_of(Gated(), x) == {"down": ["gate", "up"]}
    assert parts_of(Gated(other="up"), x) == {"down": ["gate"]}
    # The second block's layers don't make up for the first's: the residual stream carries those to everything.
    assert parts_of(nn.Sequential(Gated(other="x"), Gated(other="x")), x) == {
        "0.down": ["0.gate", "0.up"],
        "1.down": ["1.gate", "1.up"],
    }
    # In a chain a layer that makes up for one is not itself made up for.
    chain = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 64))
    assert parts_of(chain, x) == {"2": ["0"], "6": ["4"]}


def test_replay_gives_the_inputs_of_the_rounded_model() -> None:
    model, x = Gated(other="x").eval(), torch.randn(2, 5, 64)
    program = capture(model, x)
    parts = list(find_parts(find_linears(program.graph_module)).values())
    rounded = {name: torch.randn(96, 64) for name in ("gate", "up")}
    seen: list[tuple[str, Tensor, Tensor]] = []
    replay(
        program,
        {program.inputs[0].name: x},
        parts,
        rounded,
        lambda layer, h, other: seen.append((layer.name, h, other)),
    )
    ((name, h, other),) = seen
    with torch.no_grad():
        torch.testing.assert_close(h, F.silu(model.gate(x)) * model.up(x))
        gate, up = (F.linear(x, rounded[name], getattr(model, name).bias) for name in ("gate", "up"))
    assert name == "down"
    torch.testing.assert_close(other, F.silu(gate) * up)


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1])
def test_unseen_tokens_lose_less(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where moments are held for one layer at a time."""
    monkeypatch.setattr("lincompile.passes.quantization.weight_methods._MOMENT_BYTES", chunk_bytes)
    model, x = Gated(32, 96).eval(), torch.randn(2, 5, 32)
    program = capture(model, x)
    layers = find_linears(program.graph_module)
    data = [{program.inputs[0].name: torch.randn(8, 256, 32)} for _ in range(4)]
    unseen = torch.randn(8, 256, 32)

    def loss(compensate: bool) -> float:
        rounder = WeightRounder(program, layers, "gptq", data, 128, compensate=compensate)
        codes = {layer.name: rounder(layer, SCHEMES["w6a16"]) for layer in layers}
        weights = {name: dequantize(*pair) for name, pair in codes.items()}
        gate, up = (F.linear(unseen, weights[name], getattr(model, name).bias) for name in ("gate", "up"))
        return float((F.linear(F.silu(gate) * up, weights["down"], model.down.bias) - model(unseen)).square().mean())

    with torch.no_grad():
        assert loss(True) < 0.97 * loss(False)


def test_plans_of_several_widths_make_up_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer must not undo an error that its makers, kept at eight bits or in float, don't make."""
    asked: list[bool] = []
    start = WeightRounder.__init__

    def spy(self: WeightRounder, *args: object, compensate: bool = False, **more: object) -> None:
        asked.append(compensate)
        start(self, *args, compensate=compensate, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(WeightRounder, "__init__", spy)
    model, x = Gated().eval(), torch.randn(2, 5, 64)
    data = [{capture(model, x).inputs[0].name: torch.randn(2, 64, 64)}]
    for plan, schemes in (("w6a8", None), ("int6", None), ("auto:7", None), ("w6a8", {"gate": "w8a8"})):
        Quantize(plan, calibration=data, schemes=schemes).run(capture(model, x))
    assert asked == [True, True, False, False]
