"""Weight rounding methods: each does what it promises on correlated inputs, and the pass uses its codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lincompile.kernels.int6_linear.codes import dequantize, quantize_weight
from lincompile.passes.capture import capture
from lincompile.passes.errors import LincompileError
from lincompile.passes.quantization import weight_methods
from lincompile.passes.quantization.linear_layers import find_linears
from lincompile.passes.quantization.weight_methods import clip, gptq
from lincompile.passes.quantize import Quantize


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs with a few strong shared directions and uneven feature sizes."""
    mix = torch.randn(8, width) * torch.rand(width) * 3
    return torch.randn(tokens, 8) @ mix + 0.3 * torch.randn(tokens, width)


def output_error(weight: Tensor, codes: tuple[Tensor, Tensor], x: Tensor) -> float:
    return float(((dequantize(*codes) - weight) @ x.t()).square().sum() / (weight @ x.t()).square().sum())


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("width", [256, 172])
def test_gptq_lowers_the_output_error_on_unseen_inputs(width: int, bits: int) -> None:
    x = correlated(4096, width)
    weight, moment = torch.randn(48, width), x[:2048].t() @ x[:2048] / 2048
    plain, fed_back = quantize_weight(weight, bits=bits), gptq(weight, moment, 128, bits)
    assert output_error(weight, fed_back, x[2048:]) < 0.5 * output_error(weight, plain, x[2048:])
    assert fed_back[0].dtype == torch.int8 and int(fed_back[0].abs().max()) <= {6: 32, 8: 128}[bits]


def test_errors_move_between_outputs_that_matter_together() -> None:
    """Gradients of few shared directions: what one output gets wrong, others make up for, on unseen tokens too."""
    x, g = correlated(4096, 160), correlated(4096, 96)
    weight = torch.randn(96, 160)
    inputs, outputs = (z[:2048].t() @ z[:2048] / 2048 for z in (x, g))

    def loss(codes: tuple[Tensor, Tensor]) -> float:
        error = dequantize(*codes) - weight
        return float(((x[2048:] @ error.t()) * g[2048:]).sum(dim=1).square().mean())

    one_sided = gptq(weight, inputs, 128, 6)
    assert loss(gptq(weight, inputs, 128, 6, outputs)) < 0.7 * loss(one_sided)
    # Outputs that have nothing to do with each other leave nothing to move.
    alone = gptq(weight, inputs, 128, 6, torch.diag(torch.rand(96) + 0.1))
    assert torch.equal(alone[0], one_sided[0]) and torch.equal(alone[1], one_sided[1])


def test_outputs_of_a_smoothed_layer_are_weighed_by_their_new_gradients() -> None:
    """Rows divided by s have gradients s times as large: moments taken before must say what those after do."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(96, 64), nn.Linear(96, 64), nn.Linear(64, 96)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
            return out

    model = Gated().eval()
    with torch.no_grad():
        model.up.weight[5] *= 100
    program = capture(model, torch.randn(2, 5, 96))
    data = [{program.inputs[0].name: correlated(64, 96).view(1, 64, 96)}]
    rounder = weight_methods.WeightRounder(program, find_linears(program.graph_module), "gptq", data, 128)
    before = rounder.moments()["up"].outputs
    assert rounder.moments()["down"].outputs is None  # more outputs than inputs: errors stay where they are
    scale = rounder.smooth(find_linears(program.graph_module), 1.0)["down"]
    found = rounder.moments()["up"].outputs
    after = weight_methods.WeightRounder(program, find_linears(program.graph_module), "gptq", data, 128).moments()
    assert before is not None and found is not None and after["up"].outputs is not None and float(scale.max()) > 1
    torch.testing.assert_close(
        found / found.mean(), after["up"].outputs / after["up"].outputs.mean(), rtol=1e-3, atol=1e-3
    )


def test_gptq_without_correlation_only_clips() -> None:
    """A diagonal moment matrix leaves nothing to feed back, so both must choose the same codes."""
    weight, importance = torch.randn(16, 300), torch.rand(300) + 0.1
    codes, scale = gptq(weight, torch.diag(importance), 128, 6)
    expected = clip(weight, importance, 128, 6)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


def test_gptq_keeps_features_that_calibration_never_saw() -> None:
    moment = torch.eye(256)
    moment[5, 5] = 0
    weight = torch.randn(4, 256)
    codes, scale = gptq(weight, moment, 128, 6)
    assert torch.equal(codes, quantize_weight(weight, scale=scale)[0])
    assert bool((gptq(weight, torch.zeros(256, 256), 128, 6)[0] != 0).any())


def test_tokens_count_by_their_gradient() -> None:
    """Huge activations of tokens that don't reach the output must not decide how weights are rounded."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, 64)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return self.linear(x) * keep.unsqueeze(-1)

    model = Gate().eval()
    keep = torch.ones(2, 64)
    keep[:, 0] = 0
    *seen, unseen = correlated(384, 128).split(128)
    data = [(x.view(2, 64, 128), keep) for x in seen]
    for x, _ in data:
        x[:, 0] = 100 * torch.randn(2, 128)
    program = capture(model, data[0])
    names = [item.name for item in program.inputs]
    held_out = (unseen.view(2, 64, 128), keep)
    expected, error = program(*held_out), {}
    batches = [dict(zip(names, pair, strict=True)) for pair in data]
    for method in ("rtn", "gptq"):
        quantized = program.clone()
        Quantize("w6a16", method=method, calibration=batches).run(quantized)
        error[method] = float((quantized(*held_out) - expected).detach().norm())
    assert error["gptq"] < 0.3 * error["rtn"]


def test_clip_lowers_the_weighted_error_and_never_raises_it() -> None:
    weight = torch.randn(32, 300)
    weight[:, 7] *= 4  # an outlier on a feature that is almost always 0
    importance = torch.rand(300)
    importance[7] = 1e-4

    def error(codes: tuple[Tensor, Tensor]) -> Tensor:
        return ((dequantize(*codes) - weight).square() * importance).sum(dim=1)

    plain, clipped = quantize_weight(weight), clip(weight, importance, 128, 6)
    assert bool((error(clipped) <= error(plain) * (1 + 1e-6)).all())
    assert float(error(clipped).sum()) < 0.8 * float(error(plain).sum())


@pytest.mark.parametrize("method", ["clip", "gptq"])
def test_the_pass_packs_the_codes_of_its_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    program = capture(model, torch.randn(2, 5, 96))
    name = program.inputs[0].name
    *seen, unseen = correlated(768, 96).split([128, 128, 128, 128, 256])
    data = [{name: x.view(2, 64, 96)} for x in seen]
    # Collected for one group of layers at a time, however little memory is allowed.
    monkeypatch.setattr(weight_methods, "_MOMENT_BYTES", 1)
    held_out = unseen.view(1, 256, 96)
    expected = model(held_out)
    error = {}
    for used in ("rtn", method):
        quantized = program.clone()
        report = Quantize("w6a16", method=used, calibration=data).run(quantized).report
        assert report["method"] == used and report["totals"]["layers"] == 2
        error[used] = float((quantized(held_out) - expected).detach().norm())
    assert error[method] < error["rtn"] * (1.0 if method == "gptq" else 1.05)
    automatic = Quantize("w6a16", calibration=data).run(program.clone()).report
    assert automatic["method"] == "gptq" and Quantize("w6a16").run(program).report["method"] == "rtn"


def test_choosing_needs_no_more_than_one_layers_moments_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    program = capture(model, torch.randn(2, 5, 96))
    data = [{program.inputs[0].name: correlated(64, 96).view(1, 64, 96)} for _ in range(2)]
    whole = Quantize("auto:8", calibration=data).run(program.clone()).report
    monkeypatch.setattr(weight_methods, "_MOMENT_BYTES", 1)
    held: list[int] = []
    collect = weight_methods.WeightRounder._collect

    def counted(self: weight_methods.WeightRounder, layers: list) -> dict[str, Tensor]:
        held.append(len(layers))
        return collect(self, layers)

    monkeypatch.setattr(weight_methods.WeightRounder, "_collect", counted)
    parts = Quantize("auto:8", calibration=data).run(program.clone()).report
    assert held == [1, 1, 1]  # each layer once, alone
    assert parts["choice"]["kl"]["plan"] == pytest.approx(whole["choice"]["kl"]["plan"], rel=1e-2)


def test_the_measured_divergence_is_that_of_the_packed_codes() -> None:
    """int6 with GPTQ: the report's figure comes from the codes that end up in the program."""
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    program = capture(model, torch.randn(2, 5, 96))
    name = program.inputs[0].name
    data = [{name: correlated(64, 96).view(1, 64, 96)} for _ in range(2)]
    before = [program(**batch).detach() for batch in data]
    report = Quantize("int6", method="gptq", calibration=data).run(program).report
    after = [program(**batch).detach() for batch in data]
    found = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)) / 2 / 128
    assert report["choice"]["kl"]["plan"] == pytest.approx(found, rel=1e-3)


def test_methods_are_checked() -> None:
    program = capture(nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 5, 64))
    with pytest.raises(
        LincompileError, match="unknown quantization method 'awq'; the choices are auto, rtn, clip, gptq"
    ):
        Quantize("w6a8", method="awq").run(program)
    with pytest.raises(LincompileError, match="'gptq' needs calibration batches"):
        Quantize("w6a8", method="gptq").run(program)
