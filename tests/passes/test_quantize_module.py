"""``quantize_`` on plain modules."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn

from lincompile.kernels.int6_linear.codes import dequantize, quantize_weight
from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.quantization.module import W6A6, W6A8, W6A16, W8A8, QuantizedLinear, WeightConfig, quantize_


@pytest.mark.parametrize("config", [W6A8(), W6A6(64), W6A16(group_size=32), W8A8()])
def test_layers_are_replaced_in_place(config: WeightConfig) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 32, bias=False))
    x, twin = torch.randn(3, 96), nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 32, bias=False))
    twin.load_state_dict(model.state_dict())
    for layer in (twin[0], twin[2]):
        codes = quantize_weight(layer.weight.detach(), config.group_size, bits=config.scheme.weight_bits)
        layer.weight.data = dequantize(*codes, config.group_size)
    report = quantize_(model, config)
    assert [type(m) for m in model] == [QuantizedLinear, nn.Tanh, QuantizedLinear]
    tolerance = {"a16": 1e-5, "a8": 0.02, "a6": 0.08}[config.scheme.activation]
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=tolerance)
    assert report["totals"]["weights"] == 96 * 64 + 64 * 32 and "0.weight" not in model.state_dict()


def test_filter_fn_chooses_and_heads_stay_float_by_default() -> None:
    model, _ = zoo.build("llama")
    assert all("lm_head" in record["name"] for record in quantize_(model, W6A8())["skipped"])
    model, _ = zoo.build("llama")
    report = quantize_(model, W6A8(), filter_fn=lambda _, name: "mlp" in name)
    assert {record["name"].split(".")[-2] for record in report["layers"]} == {"mlp"}


def test_gpt2_conv1d_is_read_transposed_and_its_tied_head_is_left() -> None:
    model, example = zoo.build("gpt2")
    before = model(**example)
    report = quantize_(model, W8A8(), filter_fn=lambda _, name: True)
    after = model(**example)
    assert report["totals"]["layers"] == 8
    assert [r["reason"] for r in report["skipped"] if r["name"].endswith("lm_head")] == [
        "its weight is tied to another module's"
    ]
    assert float((after - before).detach().norm() / before.detach().norm()) < 0.05


def test_modules_that_read_their_linears_weights_directly_are_left_alone() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), nn.Linear(64, 64)).eval()
    report = quantize_(model, W6A8())
    assert [record["name"] for record in report["layers"]] == ["1"]
    assert {record["reason"] for record in report["skipped"]} == {
        "nn.MultiheadAttention reads its weight directly",
        "nn.TransformerEncoderLayer reads its weight directly",
    }
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64)).shape == (2, 3, 64)


def test_the_state_dict_reloads_bit_for_bit() -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 32))
        quantize_(model, W6A8())
        return model

    first, second = build(1), build(2)
    second.load_state_dict(first.state_dict())
    x: Tensor = torch.randn(2, 96)
    assert torch.equal(first(x), second(x))


def test_what_cannot_be_quantized_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(LincompileError, match="weights of '1' hold NaN or infinity"):
        quantize_(model, W6A8())
    assert isinstance(model[0], nn.Linear)  # nothing was replaced
    with pytest.raises(RefusedError, match="no linear layers"):
        quantize_(nn.Sequential(nn.Tanh()), W6A8())
    with pytest.raises(RefusedError, match="0: left in float by filter_fn"):
        quantize_(model, W6A8(), filter_fn=lambda *_: False)
