"""What only looks like a plain linear layer is left in float with a reason; measures of nothing are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional

import lincompile
from lincompile.passes.errors import LincompileError
from lincompile.passes.quantization.linear_layers import find_linears
from lincompile.passes.quantization.schemes import SCHEMES
from lincompile.passes.quantization.sensitivity import divergence, rtn_codes

WIDTH = 64


class Lora(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def doubled(_: nn.Module, __: object, out: Tensor) -> Tensor:
    return out * 2


def test_layers_that_do_more_than_their_product_are_kept() -> None:
    torch.manual_seed(0)
    hooked, computed = nn.Linear(WIDTH, WIDTH), nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    hooked.register_forward_hook(doubled)
    model, x = nn.Sequential(Lora(WIDTH, WIDTH), hooked, computed, nn.Linear(WIDTH, WIDTH)), torch.randn(3, WIDTH)
    want = model(x)
    report = lincompile.quantize_(model, lincompile.W6A16())
    assert [layer["name"] for layer in report["layers"]] == ["3"]
    reasons = {item["name"]: item["reason"] for item in report["skipped"]}
    assert "Lora has a forward of its own" in reasons["0"] and "hooks" in reasons["1"]
    assert "a forward of its own" in reasons["2"] or "parametrization" in reasons["2"]
    assert (model(x) - want).norm() < 0.05 * want.norm()


def test_a_layer_of_two_names_is_packed_under_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)})
    model["b"] = model["a"]
    lincompile.quantize_(model, lincompile.W6A8())
    assert model["a"] is model["b"] and type(model["a"]).__name__ == "QuantizedLinear"


def test_outputs_may_be_changed_in_place_and_inputs_be_vectors() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
    lincompile.quantize_(model, lincompile.W6A8())
    for shape in ((2, WIDTH), (2, 3, WIDTH), (40, WIDTH), (WIDTH,)):
        model.zero_grad()
        model(torch.randn(shape)).sum().backward()
        assert model[2].bias.grad is not None and bool(model[2].bias.grad.isfinite().all())


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    lincompile.quantize_(model, lincompile.W6A8())
    x = torch.randn(40, WIDTH)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x), want, rtol=0, atol=0)


class Own(nn.Module):
    """A product, scaled by a buffer that has the name that a packed weight's scales would have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, WIDTH))
        self.register_buffer("weight_scale", torch.rand(48, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) * self.weight_scale[:, 0]


def test_names_that_the_model_uses_are_not_taken() -> None:
    module, x = nn.Sequential(Own(), nn.Linear(48, WIDTH)), torch.randn(2, 5, WIDTH)
    program = lincompile.capture(module, {"input": x})
    result = lincompile.Quantize("w6a16").run(program)
    reasons = [item["reason"] for item in result.report["skipped"]]
    assert any("the model has a tensor '0.weight_scale' of its own" in reason for reason in reasons), reasons
    want = module(x)
    assert (result.program(x) - want).norm() < 0.05 * want.norm()


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, WIDTH))
        self.plain = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.plain(functional.linear(x, self.weight.expand(8, WIDTH)))
        return result


def test_an_expanded_weight_is_not_the_parameter() -> None:
    program = lincompile.capture(Expanded(), {"x": torch.randn(2, 5, WIDTH)})
    names = [layer.name for layer in find_linears(program.graph_module, min_in_features=1) if layer.reason is None]
    assert names == ["plain"]


class Masked(nn.Module):
    """Logits of which the last are excluded."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("excluded", torch.arange(vocabulary) >= vocabulary - 6)

    def forward(self, idx: Tensor) -> Tensor:
        return torch.masked_fill(self.model(idx), self.excluded, -torch.inf)


def test_excluded_tokens_leave_the_divergence_finite() -> None:
    module, example = zoo.build("nanogpt")
    program = lincompile.capture(Masked(module, zoo.VOCAB), example)
    program = lincompile.Pipeline([lincompile.Canonicalize()])(program)
    layers = [layer for layer in find_linears(program.graph_module) if layer.reason is None]
    plans = {name: {layer.name: SCHEMES[name] for layer in layers} for name in ("w6a6", "w6a8")}
    found = divergence(program, layers, plans, [example], rtn_codes(program, 128), 128)
    assert 0 < found["w6a8"] < found["w6a6"] < 10


def test_padding_alone_calibrates_nothing() -> None:
    module, example = zoo.build("llama-gqa")
    program = lincompile.Pipeline([lincompile.Canonicalize()])(lincompile.capture(module, example))
    batch = example | {name: torch.zeros_like(value) for name, value in example.items() if "mask" in name}
    with pytest.raises(LincompileError, match="padding alone"):
        lincompile.Quantize("int6", calibration=[batch]).run(program)


def test_scores_of_a_model_with_other_norms_are_refused(tmp_path: Path) -> None:
    module, example = zoo.build("nanogpt")
    file = str(tmp_path / "scores.json")

    def quantized() -> None:
        program = lincompile.Pipeline([lincompile.Canonicalize()])(lincompile.capture(module, example))
        lincompile.Quantize("auto:7", calibration=[example], scores=file).run(program)

    quantized()
    quantized()
    with torch.no_grad():
        next(p for name, p in module.named_parameters() if "norm" in name or "ln" in name).mul_(30)
    with pytest.raises(LincompileError, match=r"scores\.json"):
        quantized()
