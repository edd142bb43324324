"""Quantization of captured programs: what is found, what is left alone and why, what remains in memory."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.kernels.int6_linear.codes import dequantize, quantize_weight, sqnr_db
from lincompile.passes.capture import capture
from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.pipeline import Pipeline, format_pass
from lincompile.passes.program import Program
from lincompile.passes.quantization.linear_layers import find_linears
from lincompile.passes.quantize import FLOAT, SCHEMES, Quantize, parse_plan
from lincompile.passes.verify import verify


class Spellings(nn.Module):
    """One linear layer in each spelling that a captured graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 96)
        self.conv1d = nn.Parameter(torch.randn(96, 160) * 0.1)
        self.conv1d_bias = nn.Parameter(torch.randn(160))
        self.plain = nn.Parameter(torch.randn(160, 64) * 0.1)
        self.turned = nn.Parameter(torch.randn(72, 64) * 0.1)
        self.swapped = nn.Parameter(torch.randn(64, 72) * 0.1)
        self.batched = nn.Parameter(torch.randn(64, 64) * 0.1)
        self.permuted = nn.Parameter(torch.randn(64, 64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        x = torch.addmm(self.conv1d_bias, x.flatten(0, 1), self.conv1d).view(*x.shape[:2], 160)
        x = torch.tanh(x @ self.plain)
        x = torch.tanh(x @ self.turned.t())
        x = torch.tanh(torch.mm(x.flatten(0, 1), self.swapped.transpose(0, 1)).view(*x.shape[:2], 64))
        x = torch.tanh(torch.bmm(x, self.batched.T.expand(x.shape[0], 64, 64)))
        return x @ self.permuted.permute(1, 0)


def features(width: int = 64) -> Tensor:
    return torch.randn(2, 5, width)


def dequantized_twin(model: nn.Module, report: dict[str, Any], transposed: set[str]) -> nn.Module:
    """The model with each quantized weight rounded by hand and put back as a float."""
    twin = copy.deepcopy(model)
    for record in report["layers"]:
        weight = twin.get_parameter(record["weight"])
        matrix = weight.t() if record["weight"] in transposed else weight
        with torch.no_grad():
            matrix.copy_(dequantize(*quantize_weight(matrix.detach(), bits=SCHEMES[record["scheme"]].weight_bits)))
    return twin


@pytest.mark.parametrize("scheme", ["w6a16", "w6a8", "w6a6", "w8a8"])
def test_every_spelling_of_a_linear_becomes_one_op(scheme: str) -> None:
    model = Spellings().eval()
    x = features()
    expected = model(x).detach()
    program = capture(model, x)
    result = Quantize(scheme).run(program)
    counts = program.op_counts()
    op = "int8_linear" if scheme == "w8a8" else "int6_linear"
    assert result.modified and counts[f"lincompile.{op}.default"] == 7
    assert not [name for name in counts if any(word in name for word in ("addmm", "mm.", "matmul", "aten.linear"))]
    names = ["linear", "conv1d", "plain", "turned", "swapped", "batched", "permuted"]
    assert [record["name"] for record in result.report["layers"]] == names
    assert all(record["sqnr_db"] > 25 for record in result.report["layers"])
    got = program(x)
    assert sqnr_db(expected, got) > {"w6a16": 20, "w6a8": 20, "w6a6": 15, "w8a8": 30}[scheme]
    if scheme == "w6a16":
        twin = dequantized_twin(model, result.report, {"conv1d", "plain"})
        torch.testing.assert_close(got, twin(x), rtol=1e-5, atol=1e-5)


def test_float_weights_leave_memory_and_the_state_dict() -> None:
    model, example = zoo.build("llama-gqa")
    program = capture(model, example)
    names = {layer.weight for layer in find_linears(program.graph_module) if layer.reason is None}
    report = Quantize("w6a8").run(program).report
    state = program.graph_module.state_dict()
    assert len(names) == 14 and not names & set(state)
    assert not names & {name for name, _ in program.graph_module.named_parameters(remove_duplicate=False)}
    for record in report["layers"]:
        buffers = {suffix: state[record["weight"] + suffix] for suffix in ("_hi", "_lo", "_scale")}
        assert [b.dtype for b in buffers.values()] == [torch.uint8, torch.uint8, torch.float16]
        assert sum(b.numel() * b.element_size() for b in buffers.values()) == record["bytes_after"]
        assert record["bytes_before"] == 4 * record["out_features"] * record["in_features"]
    totals = report["totals"]
    assert totals["weights"] == sum(r["out_features"] * r["in_features"] for r in report["layers"])
    assert totals["bytes_after"] == sum(r["bytes_after"] for r in report["layers"])


def test_smollm2_shapes_take_at_most_078_bytes_per_weight() -> None:
    for out_features, in_features in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        model = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
        program = capture(model, torch.randn(2, 3, in_features))
        report = Quantize("w6a8").run(program).report
        resident = sum(t.numel() * t.element_size() for t in program.graph_module.state_dict().values())
        assert resident == report["totals"]["bytes_after"] <= 0.78 * out_features * in_features
        assert report["totals"]["bytes_per_weight"] <= 0.78


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt-neox", "nanogpt", "torch-encoder", "torch-multihead"])
def test_models_keep_their_dynamic_shapes_and_stay_close(name: str) -> None:
    model, example = zoo.build(name)
    program = capture(model, example)
    wide = {key: _wider(value) for key, value in program.example.items()}
    before = _tensor(program(**wide))
    result = Quantize("w8a8").run(program)
    assert result.modified and sqnr_db(before, _tensor(program(**wide))) > 20
    assert Quantize("w8a8").run(program).modified is False


def _wider(value: Tensor) -> Tensor:
    return torch.cat([value, value.flip(0), value], dim=0) if value.dim() else value


def _tensor(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, tuple) else value
    return tensor.detach()


def test_a_linear_fed_by_another_linear_reads_the_new_node() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    x = features()
    program = capture(model, x)
    report = Quantize("w6a16").run(program).report
    assert report["totals"]["layers"] == 3
    torch.testing.assert_close(program(x), dequantized_twin(model, report, set())(x), rtol=1e-5, atol=1e-5)


def test_running_twice_changes_nothing() -> None:
    program = capture(Spellings().eval(), features())
    Quantize("w6a8").run(program)
    nodes, state = str(program.graph_module.graph), program.graph_module.state_dict()
    again = Quantize("w6a8").run(program)
    assert again.modified is False and again.report["already_quantized_calls"] == 7
    assert str(program.graph_module.graph) == nodes and set(program.graph_module.state_dict()) == set(state)


def test_the_record_holds_the_layers_of_every_run() -> None:
    program = capture(Spellings().eval(), features())
    first = Quantize("w8a8", schemes=dict.fromkeys(["conv1d", "plain", "turned", "swapped"], "float")).run(program)
    Quantize("w6a8", skip=("plain",), method="rtn").run(program)
    record = program.metadata["quantization"]
    schemes = {layer["name"]: layer["scheme"] for layer in record["layers"]}
    assert schemes == {
        "linear": "w8a8", "batched": "w8a8", "permuted": "w8a8", "conv1d": "w6a8", "turned": "w6a8", "swapped": "w6a8"
    }  # fmt: skip
    assert [(layer["name"], layer["reason"]) for layer in record["skipped"]] == [
        ("plain", "left in float as asked (skip)")
    ]
    totals = record["totals"]
    assert totals["schemes"] == {"w8a8": 3, "w6a8": 3} and (totals["layers"], totals["skipped"]) == (6, 1)
    assert totals["bytes_after"] == sum(layer["bytes_after"] for layer in record["layers"])
    assert record["plan"] == "w6a8" and [how["plan"] for how in record["earlier"]] == ["w8a8"]
    assert len(first.report["layers"]) == 3, "a pass's report is its own"
    Quantize("w6a6", skip=("plain",)).run(program)
    assert program.metadata["quantization"] == record, "nothing was left to pack"


def test_the_quantized_state_reloads_bit_for_bit() -> None:
    model, example = zoo.build("gpt2")
    first, second = capture(model, example), capture(zoo.build("gpt2", seed=1)[0], example)
    Quantize("w6a8").run(first)
    Quantize("w6a8").run(second)
    assert not torch.equal(_tensor(first(**first.example)), _tensor(second(**first.example)))
    second.graph_module.load_state_dict(first.graph_module.state_dict())
    assert torch.equal(_tensor(first(**first.example)), _tensor(second(**first.example)))


def test_tied_layers_are_quantized_once_and_share_their_planes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.tanh(self.a(x)))
            return out

    program = capture(Tied().eval(), features())
    report = Quantize("w6a8").run(program).report
    assert [record["calls"] for record in report["layers"]] == [2]
    state = program.graph_module.state_dict()
    assert len([name for name in state if name.endswith("_hi")]) == 1
    assert not [name for name in state if name.endswith(".weight")]


def reasons(program: Program, **options: Any) -> dict[str, str]:
    return {layer.name: layer.reason for layer in find_linears(program.graph_module, **options) if layer.reason}


def test_each_layer_left_alone_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(50, 64)
            self.small = nn.Linear(8, 64)
            self.both = nn.Parameter(torch.randn(64, 64))
            self.stack = nn.Parameter(torch.randn(2, 64, 64))
            self.fused = nn.Parameter(torch.randn(128, 64))
            self.scaled = nn.Parameter(torch.randn(64, 64))
            self.ok = nn.Linear(64, 64)
            self.out = nn.Linear(64, 50)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.wte(tokens)
            x = x + self.small(x[..., :8])
            x = x @ self.both + x @ self.both.t()
            x = (
                x
                + torch.matmul(x.transpose(0, 1)[:2].transpose(1, 2).transpose(1, 2), self.stack).transpose(0, 1)[:, :1]
            )
            x = x + F.linear(x, self.fused[:64])
            flat = x.flatten(0, 1)
            x = x + torch.addmm(flat, flat, self.scaled, beta=0.5).view(x.shape)
            out: Tensor = self.out(self.ok(x))
            return out

    program = capture(Odd().eval(), torch.randint(0, 50, (2, 6)))
    found = reasons(program)
    assert found["small"] == "K = 8 is below 32: scales would cost more than they save"
    assert found["both"] == "the same parameter is used both straight and transposed"
    assert found["stack"] == "its weight has 3 axes [2, 64, 64], not two"
    assert found["fused"] == "its weight is a slice of a larger parameter"
    assert found["scaled"] == "addmm with beta=0.5"
    assert found["out"] == "output head (lm_head=True includes it)"
    assert "ok" not in found and "out" not in reasons(program, lm_head=True)
    report = Quantize("w6a8").run(program).report
    assert [record["name"] for record in report["layers"]] == ["ok"]
    assert {record["name"]: record["reason"] for record in report["skipped"]} == found


def test_a_head_tied_to_the_embedding_stays_float_even_when_asked_for() -> None:
    program = capture(*zoo.build("gpt2"))
    assert reasons(program, lm_head=True) == {
        "lm_head": "its weight is tied: also read by embedding, which needs it in float"
    }


def test_parameters_of_attention_methods_are_left_alone() -> None:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lincompile_attention = nn.ModuleList([nn.Linear(64, 64)])
            self.proj = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.proj(self.lincompile_attention[0](x))
            return out

    program = capture(Method().eval(), features())
    assert reasons(program) == {"lincompile_attention.0": "parameter of an attention method (small, stays trainable)"}


def test_einsums_with_a_parameter_are_listed_with_the_reason() -> None:
    class Einsums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ok, self.tied = nn.Linear(64, 64), nn.Linear(64, 64)
            self.heads = nn.Parameter(torch.randn(64, 4, 16) * 0.1)
            self.out = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum("btc,chd->bthd", self.ok(x), self.heads).flatten(2)
            y = torch.einsum("btc,dc->btd", y, self.tied.weight) + self.tied(y)
            y = torch.einsum("btc,cd->btd", y, self.out.weight.t())
            return torch.einsum("btc,bsc->bts", y, y)

    program = capture(Einsums().eval(), features())
    report = Quantize("w6a8", skip=("heads",)).run(program).report
    assert [record["name"] for record in report["layers"]] == ["ok"]
    assert {record["name"]: record["reason"] for record in report["skipped"]} == {
        "tied": "its weight is tied: also read by einsum, which needs it in float",
        "heads": "it is read by an einsum (btc,chd->bthd)",
        "out": "it is read by an einsum (btc,cd->btd)",
    }
    assert [record["name"] for record in Quantize("w6a8").run(program).report["skipped"]] == ["tied", "heads", "out"]


def test_layers_too_small_in_magnitude_stay_float_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    nn.init.normal_(model[0].weight, std=1e-8)
    program = capture(model, features())
    report = Quantize("w6a8").run(program).report
    assert [record["name"] for record in report["layers"]] == ["1"]
    assert "too small for float16 scales" in report["skipped"][0]["reason"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_named_and_nothing_is_changed(bad: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[1].weight[3, 3] = bad
    program = capture(model, features())
    before = str(program.graph_module.graph)
    with pytest.raises(LincompileError, match=r"weights of '1' \(1.weight\) hold NaN or infinity"):
        Quantize("w6a8").run(program)
    assert str(program.graph_module.graph) == before
    assert Quantize("w6a8", skip=("1",)).run(program).modified


def test_a_model_with_nothing_to_quantize_is_refused_with_the_reasons() -> None:
    with pytest.raises(RefusedError, match=r"no layer of the model can be quantized to w6a8: 0: K = 8 is below 32"):
        Quantize("w6a8").run(capture(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 3, 8)))
    tiny = nn.Sequential(nn.Linear(64, 64)).eval()
    nn.init.normal_(tiny[0].weight, std=1e-8)
    for data in (None, [{"input": torch.randn(2, 3, 64)}]):
        with pytest.raises(RefusedError, match="can be quantized to int6: 0: row 0 is too small for float16 scales"):
            Quantize("int6", calibration=data).run(capture(tiny, torch.randn(2, 3, 64)))
    with pytest.raises(RefusedError, match="no linear layer with a parameter"):
        Quantize("int6").run(capture(nn.Sequential(nn.LayerNorm(8)), torch.randn(2, 3, 8)))


def test_skip_patterns_and_saved_plans_choose_layers_by_name() -> None:
    program = capture(Spellings().eval(), features())
    plan = {"plain": "w6a6", "turned": "float", "linear": "w8a8"}
    report = Quantize("w6a8", skip=("conv*",), schemes=plan).run(program).report
    chosen = {record["name"]: record["scheme"] for record in report["layers"]}
    assert chosen == {
        "linear": "w8a8", "plain": "w6a6", "swapped": "w6a8", "batched": "w6a8", "permuted": "w6a8"
    }  # fmt: skip
    assert {r["name"]: r["reason"] for r in report["skipped"]} == {
        "conv1d": "left in float as asked (skip)",
        "turned": "kept in float by the plan",
    }
    assert report["totals"]["schemes"] == {"w8a8": 1, "w6a6": 1, "w6a8": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ("nothing.*",)}, r"skip pattern 'nothing\.\*' matches no linear layer; layers are linear, conv1d"),
        ({"schemes": {"elsewhere": "w6a8"}}, "the plan names 'elsewhere', which is no quantizable layer"),
        ({"schemes": {"plain": "w4a4"}}, "gives 'plain' the scheme 'w4a4'; the schemes are w6a6, w6a8"),
    ],
)
def test_plans_that_name_what_is_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    program = capture(Spellings().eval(), features())
    with pytest.raises(LincompileError, match=message):
        Quantize("w6a8", **options).run(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "w6a8", "activation_bits": 6.5}, "activation_bits has no effect on the plan w6a8: it is for int6"),
        ({"plan": "auto:7", "activation_bits": 6.5}, "activation_bits has no effect on the plan auto:7"),
        ({"plan": "int6", "effective_bits": 7.0}, "effective_bits has no effect on the plan int6: it is for auto"),
        ({"plan": "w8a8", "max_latency": 5.0}, "max_latency has no effect on the plan w8a8: it is for int6 and auto"),
        ({"plan": "w6a8", "scores": "scores.json"}, "scores has no effect on the plan w6a8"),
        ({"plan": "none", "metric": "kl"}, "metric has no effect on the plan none"),
        ({"plan": "auto:7", "tolerance": 1.5}, "tolerance has no effect on the plan auto:7"),
        ({"plan": "auto:7", "max_latency": 5.0}, "the plan auto:7 and max_latency are two budgets"),
        ({"plan": "auto:7", "effective_bits": 8.0}, "the plan auto:7 and effective_bits are two budgets"),
        ({"activation_bits": 6.5, "max_latency": 5.0}, "activation_bits and max_latency are two budgets"),
        ({"activation_bits": 6.5, "tolerance": 1.5}, "tolerance is how int6 chooses without a budget"),
        ({"latencies": "times.json"}, "latencies are read for max_latency alone: give that, too"),
        ({"scores": "scores.json"}, "scores needs calibration batches: without them int6 has eight-bit activations"),
    ],
)
def test_options_that_a_plan_would_ignore_are_refused(options: dict[str, Any], message: str) -> None:
    program = capture(Spellings().eval(), features())
    with pytest.raises(LincompileError, match=message):
        Quantize(**options).run(program)


def test_quantized_programs_train_what_is_left_and_survive_the_pipeline() -> None:
    model, example = zoo.build("llama")
    program = Pipeline([Quantize("w6a8")])(capture(model, example))
    assert program.history[-1]["modified"] and program.metadata["quantization"]["totals"]["layers"] == 14
    loss = _grad_tensor(program(**program.example)).square().mean()
    loss.backward()
    norm = next(p for name, p in program.graph_module.named_parameters() if name.endswith("layernorm.weight"))
    assert norm.grad is not None and bool(norm.grad.abs().sum() > 0)


def _grad_tensor(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, tuple) else value
    return tensor


def test_quantize_none_changes_nothing() -> None:
    program = capture(Spellings().eval(), features())
    assert Quantize("none").run(program).modified is False


@pytest.mark.parametrize(
    ("text", "kind", "scheme", "bits"),
    [
        ("none", "none", None, None),
        ("int6", "int6", None, None),
        ("W6A8", "uniform", "w6a8", None),
        ("w6a16", "uniform", "w6a16", None),
        ("auto:6.5", "auto", None, 6.5),
        ("auto:16", "auto", None, 16.0),
    ],
)
def test_plans_are_read(text: str, kind: str, scheme: str | None, bits: float | None) -> None:
    spec = parse_plan(text)
    assert (spec.kind, spec.scheme and spec.scheme.name, spec.effective_bits) == (kind, scheme, bits)


@pytest.mark.parametrize(
    "text", ["int5", "w4a4", "", "int6:3", "w6a8:2", "float", "auto", "auto:", "auto:x", "auto:3", "auto:nan"]
)
def test_unknown_plans_are_refused_with_the_choices(text: str) -> None:
    with pytest.raises(LincompileError, match=r"none, int6, w6a6, w6a8, w6a16, w8a8, auto:BITS|auto:6\.5"):
        parse_plan(text)


def test_int5_names_the_choices() -> None:
    with pytest.raises(LincompileError) as error:
        Quantize("int5").run(capture(Spellings().eval(), features()))
    assert str(error.value) == (
        "unknown quantization 'int5'; the choices are none, int6, w6a6, w6a8, w6a16, w8a8, auto:BITS"
    )


def test_the_pass_is_written_and_read_as_text() -> None:
    item = Quantize("w6a6", skip=("*.q_proj",), lm_head=True)
    assert format_pass(item) == "quantize{plan=w6a6,lm_head=true,skip=*.q_proj}"


def test_schemes_count_their_bytes() -> None:
    assert SCHEMES["w6a8"].weight_bytes(192, 576) == 192 * (288 + 144 + 10)
    assert SCHEMES["w8a8"].weight_bytes(192, 576) == 192 * (576 + 10)
    assert FLOAT.weight_bytes(192, 576) == 192 * 576 * 2


@pytest.mark.parametrize(
    ("plan", "position", "value", "message"),
    [
        ("w6a8", 6, "a4", "activation 'a4' isn't one of a6, a8, a16"),
        ("w6a8", 5, 32, "don't fit an input of 64 features"),
        ("w8a8", 5, "a4", "activation 'a4' isn't one of a6, a8, a16"),
        ("w8a8", 4, 32, r"weight_scale \(96, 1\) doesn't fit weight \(96, 64\)"),
    ],
)
def test_a_broken_quantized_node_is_caught_between_passes(
    plan: str, position: int, value: object, message: str
) -> None:
    program = capture(nn.Sequential(nn.Linear(64, 96)).eval(), features())
    Quantize(plan).run(program)
    assert verify(program) is None
    node = next(n for n in program.graph_module.graph.nodes if "lincompile" in str(n.target))
    node.update_arg(position, value)
    assert re.search(message, verify(program) or "")
