"""Balancing inputs and weights: the float model computes the same bits, and quantization loses less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.passes.capture import capture
from lincompile.passes.errors import LincompileError
from lincompile.passes.quantization.linear_layers import find_linears
from lincompile.passes.quantization.smooth import balance, smooth
from lincompile.passes.quantize import Quantize


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    """A gated MLP behind a normalization: two places to balance."""

    def __init__(self, norm: nn.Module, *, residual: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.residual = norm, residual
        self.gate, self.up = nn.Linear(64, 96, bias=bias), nn.Linear(64, 96, bias=bias)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.down(F.silu(self.gate(h)) * self.up(h))
        return y + h if self.residual else y


def importance_of(layers: list, width: dict[int, Tensor]) -> dict[str, Tensor]:
    return {layer.name: width[layer.in_features] for layer in layers}


UNEVEN = {64: torch.logspace(-3, 3, 64), 96: torch.logspace(3, -3, 96)}


@pytest.mark.parametrize("norm", [Norm, nn.LayerNorm], ids=["rms", "layer_norm"])
def test_the_same_bits_come_out(norm: type[nn.Module]) -> None:
    model = Gated(norm(64)).eval()  # type: ignore[call-arg]
    x = torch.randn(2, 7, 64)
    program = capture(model, x)
    before, weights = program(x), {name: p.detach().clone() for name, p in program.graph_module.named_parameters()}
    layers = find_linears(program.graph_module)
    done = smooth(program, layers, importance_of(layers, UNEVEN)).inputs
    assert set(done) == {"gate", "up", "down"} and torch.equal(done["gate"], done["up"])
    assert torch.equal(program(x), before)
    for name, scale in done.items():
        assert float(scale.max() / scale.min()) > 4 and torch.equal(scale.log2(), scale.log2().round())
        now = program.graph_module.get_parameter(name + ".weight")
        rows = done["down"].unsqueeze(1) if name == "up" else 1.0  # the rows of up make the inputs of down
        assert torch.equal(now, weights[name + ".weight"] * scale / rows)


def test_bfloat16_models_stay_the_same_too() -> None:
    model, x = Gated(Norm(64)).eval().bfloat16(), torch.randn(2, 7, 64).bfloat16()
    program = capture(model, x)
    before = program(x)
    layers = find_linears(program.graph_module)
    assert smooth(program, layers, importance_of(layers, UNEVEN)).inputs
    assert torch.equal(program(x), before)


def test_features_with_other_readers_are_left_alone() -> None:
    program = capture(Gated(Norm(64), residual=True).eval(), torch.randn(2, 7, 64))
    layers = find_linears(program.graph_module)
    assert set(smooth(program, layers, importance_of(layers, UNEVEN)).inputs) == {
        "down"
    }  # the residual reads norm's output


def test_shared_parameters_are_left_alone() -> None:
    model = nn.Sequential(Gated(Norm(64)), Gated(Norm(64))).eval()
    model[1].norm.weight = model[0].norm.weight
    model[1].up.weight = model[0].up.weight
    x = torch.randn(2, 7, 64)
    program = capture(model, x)
    before = program(x)
    layers = find_linears(program.graph_module)
    assert smooth(program, layers, importance_of(layers, UNEVEN)).inputs == {}
    assert torch.equal(program(x), before)


def test_a_layer_that_stays_float_follows_its_neighbours() -> None:
    x = torch.randn(2, 7, 64)
    program = capture(Gated(Norm(64), bias=False).eval(), x)
    before = program(x)
    layers = find_linears(program.graph_module, skip=["gate"])
    wanted = [layer for layer in layers if layer.reason is None]
    done = smooth(program, layers, importance_of(wanted, UNEVEN))
    assert set(done.inputs) == {"gate", "up", "down"}
    assert set(done.outputs) == {"up"} and torch.equal(done.outputs["up"], done.inputs["down"])
    assert torch.equal(program(x), before)


def test_balance_meets_in_the_middle() -> None:
    assert balance(torch.tensor([16.0, 1.0, 1.0, 1 / 16]), torch.ones(4), 1.0).tolist() == [2.0, 1.0, 1.0, 0.5]
    assert balance(torch.tensor([256.0, 1.0, 1.0, 1 / 256]), torch.ones(4), 0.5).tolist() == [2.0, 1.0, 1.0, 0.5]
    assert bool(balance(torch.zeros(3), torch.ones(3), 1.0).isfinite().all())  # never seen: bounded, not infinite


@pytest.mark.parametrize("plan", ["w8a8", "w6a6"])
def test_outlying_features_cost_less(plan: str) -> None:
    """Features of very different size in one group: what smoothing is for."""
    model = nn.Sequential(Norm(64), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-1.5, 1.5, 64)[torch.randperm(64)])
    x = torch.randn(2, 256, 64)
    program = capture(model, x)
    original = {name: p.detach().clone() for name, p in program.graph_module.named_parameters()}
    data = [{program.inputs[0].name: torch.randn(2, 256, 64)} for _ in range(2)]
    expected, error = program(x), {}
    for strength in (0.0, 1.0):
        quantized = program.clone()
        report = Quantize(plan, method="rtn", calibration=data, smooth=strength).run(quantized).report
        assert report["smoothing"] == {"strength": strength, "layers": int(strength)}
        error[strength] = float((quantized(x) - expected).detach().norm())
    # Clones share parameters: none of theirs may have changed.
    assert all(torch.equal(p, original[name]) for name, p in program.graph_module.named_parameters())
    assert error[1.0] < 0.75 * error[0.0]


def test_the_strength_is_checked() -> None:
    program = capture(nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 5, 64))
    with pytest.raises(LincompileError, match="smooth 2: give a strength from 0 \\(off\\) to 1"):
        Quantize("w6a8", smooth=2).run(program)


def test_without_calibration_there_is_nothing_to_smooth_by() -> None:
    program = capture(nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 5, 64))
    before = str(program.graph_module.graph)
    with pytest.raises(LincompileError, match="smooth goes by the inputs that calibration shows: give batches of it"):
        Quantize("w6a8", smooth=0.5).run(program)
    assert str(program.graph_module.graph) == before, "refused before anything happened"
    assert Quantize("w6a8", smooth=0.0).run(program).modified, "none was asked for, and none is done"
