"""Tuning of stored numbers: closer to the float model on text it never saw, or as before, and nothing else changes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import lincompile
from lincompile.kernels.int6_linear.codes import dequantize, fake_quantize_activation, quantize_weight
from lincompile.kernels.int6_linear.pack import unpack
from lincompile.lowering.options import Reporter
from lincompile.passes.capture import capture
from lincompile.passes.distil.divergence import divergence
from lincompile.passes.errors import LincompileError
from lincompile.passes.program import Program
from lincompile.passes.quantization.tune import TuneOptions, tune
from lincompile.passes.quantization.tuned_layers import Precision, TunedLinear, find_parts, learn_by, rounded_activation
from lincompile.passes.quantize import Quantize

Batches = Sequence[dict[str, Tensor]]


def chain(count: int, seed: int, length: int = 24) -> Tensor:
    """Text of a random source ``[count, length]``: each token has four successors, of which its predecessor's parity
    excludes half.
    """
    after = torch.randint(3, 97, (97, 2, 2), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 97, (count, length), generator=generator)
    coins = torch.randint(0, 2, (count, length), generator=generator)
    for t in range(2, length):
        rows[:, t] = after[rows[:, t - 1], rows[:, t - 2] % 2, coins[:, t]]
    return rows


@functools.cache
def trained() -> nn.Module:
    """A NanoGPT that has learned what there is to learn about ``chain`` in some seconds."""
    torch.manual_seed(0)
    model = zoo.NanoGPT(width=64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(300):
        rows = chain(32, 1000 + step)
        loss = model(rows[:, :-1], rows[:, 1:].contiguous())[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 2.5, float(loss.detach())
    return model.eval()


def language_model() -> Program:
    return capture(copy.deepcopy(trained()), torch.zeros(2, 16, dtype=torch.long))


def text(program: Program, count: int, seed: int, length: int = 24) -> list[dict[str, Tensor]]:
    return [{program.inputs[0].name: row[None]} for row in chain(count, seed, length)]


def kl(teacher: Program, student: Program, batches: Batches) -> float:
    with torch.no_grad():
        found = [float(divergence(student(**batch), teacher(**batch))) for batch in batches]
    return sum(found) / len(found)


def quantized(program: Program, plan: str = "w6a8", **options: Any) -> tuple[Program, dict[str, Any]]:
    student = program.clone()
    report = Quantize(plan, calibration=text(program, 4, 1), **options).run(student).report
    return student, report


def planes(program: Program) -> dict[str, Tensor]:
    """Every stored tensor by name, parameters too."""
    return {name: tensor.clone() for name, tensor in program.graph_module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("plan", "mode", "batch", "most"),
    [
        ("w6a8", "scales", 4, 0.9),
        ("w6a8", "codes", 4, 0.85),
        ("w6a16", "codes", 4, 0.8),
        ("w6a6", "scales", 12, 0.99),  # most of what is lost here is the activations'
        ("w8a8", "scales", 12, 0.99),
    ],
)
def test_text_never_seen_diverges_less(plan: str, mode: str, batch: int, most: float) -> None:
    program = language_model()
    before, _ = quantized(program, plan)
    data = text(program, 28 * batch, 2)
    found, report = quantized(program, plan, tune=mode, tune_steps=60, tune_batch=batch, tune_data=data)
    unseen = text(program, 80, 3)
    tuning = report["tuning"]
    assert tuning["kept"] and tuning["kl"]["after"] < most * tuning["kl"]["before"]
    assert kl(program, found, unseen) < most * kl(program, before, unseen)
    assert (tuning["codes_changed"] > 0) == (mode == "codes")
    assert tuning["steps"] == 60 and tuning["tokens"] == 60 * batch * 24 and tuning["best_step"] > 0
    for layer in report["layers"]:  # as small as before, and in range
        assert layer["bytes_per_weight"] == (1.03125 if plan == "w8a8" else 0.78125) or layer["in_features"] > 64
    stored = planes(found)
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == {
        name: (t.shape, t.dtype) for name, t in planes(before).items()
    }
    scales = [t for name, t in stored.items() if name.endswith("_scale")]
    assert scales and all(bool(t.isfinite().all()) and bool((t > 0).all()) for t in scales)


def test_codes_stay_in_range_at_any_rate() -> None:
    program = language_model()
    name = "h.0.attn.qkv.weight" if "h.0.attn.qkv.weight" in planes(program) else None
    student, report = quantized(program, tune=None)
    weights = {layer["weight"]: layer for layer in report["layers"]}
    parts = find_parts(student, weights, True, Precision())
    assert name is None or name in parts.linears
    generator = torch.Generator().manual_seed(0)
    for part in parts.linears.values():
        assert part.latent is not None
        with torch.no_grad():
            part.latent += 100 * torch.randn(part.latent.shape, generator=generator)
            part.change += 100 * torch.randn(part.change.shape, generator=generator)
        codes, scale = part.stored()
        assert int(codes.min()) == -32 and int(codes.max()) == 31
        assert bool(scale.isfinite().all()) and bool((scale > 0).all())


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("activation", ["a8", "a6", "a16"])
def test_the_form_that_learns_computes_what_is_stored(bits: int, activation: str) -> None:
    """Bit for bit, odd widths included; gradients are those of the plain product, straight through all rounding."""
    weight, x, bias = torch.randn(40, 172), torch.randn(3, 5, 172), torch.randn(40)
    codes, scale = quantize_weight(weight, 32, bits)
    layer = TunedLinear(codes, scale, bits, 32, True, Precision())
    x.requires_grad_()
    y = layer(rounded_activation(x, 32, activation), bias, torch.float32)
    flat = fake_quantize_activation(x.detach(), 32, activation)
    plain = dequantize(codes, scale, 32).requires_grad_()
    wanted = nn.functional.linear(flat, plain, bias)
    assert torch.equal(y, wanted) and all(map(torch.equal, layer.stored(), (codes, scale)))
    slope = torch.randn(y.shape)
    y.backward(slope)
    wanted.backward(slope)
    wide = scale.float().repeat_interleave(32, dim=1)[:, :172]
    assert layer.latent is not None and plain.grad is not None and x.grad is not None
    torch.testing.assert_close(layer.latent.grad, plain.grad * wide)
    torch.testing.assert_close(x.grad, slope @ plain.detach())
    along = plain.grad * codes * wide
    per_group = torch.stack([part.sum(dim=1) for part in along.split(32, dim=1)], dim=1)
    torch.testing.assert_close(layer.change.grad, per_group, rtol=1e-4, atol=1e-4)


def test_a_latent_beyond_the_last_code_turns_back_but_goes_no_further() -> None:
    codes, scale = torch.full((2, 32), 31, dtype=torch.int8), torch.ones(2, 1, dtype=torch.float16)
    layer = TunedLinear(codes, scale, 6, 32, True, Precision())
    assert layer.latent is not None
    with torch.no_grad():
        layer.latent += 0.2
    layer(torch.ones(1, 32), None, torch.float32).backward(torch.tensor([[-1.0, 1.0]]))
    assert layer.latent.grad is not None
    assert bool((layer.latent.grad[0] == 0).all()) and bool((layer.latent.grad[1] > 0).all())


def test_before_the_first_step_nothing_has_changed() -> None:
    """No step, or none that helped: the program is the untuned one, bit for bit."""
    program = language_model()
    plain, _ = quantized(program)
    untouched, report = quantized(program, tune="codes", tune_steps=0)
    assert same(planes(plain), planes(untouched)) and report["tuning"]["kept"] is False
    batch = text(program, 1, 5)[0]
    assert torch.equal(plain(**batch), untouched(**batch))
    # The graph that learns computes the same before it has learned.
    weights = {layer["weight"]: layer for layer in report["layers"]}
    learning = plain.clone()
    learn_by(learning.graph_module, find_parts(plain, weights, True, Precision()))
    torch.testing.assert_close(learning(**batch), plain(**batch), rtol=1e-5, atol=1e-5)


def test_a_result_that_is_no_better_is_refused_with_both_figures() -> None:
    program = language_model()
    plain, _ = quantized(program)
    found, report = quantized(program, tune="codes", tune_steps=6, tune_rate=1000.0, tune_data=text(program, 16, 2))
    tuning = report["tuning"]
    assert not tuning["kept"] and tuning["codes_changed"] == 0 and tuning["steps"] == 6
    assert tuning["kl"]["before"] == tuning["kl"]["after"] < min(value for _, value in tuning["measured"])
    assert f"{tuning['kl']['before']:.5f}" in tuning["note"] and "as they were" in tuning["note"]
    assert same(planes(plain), planes(found))


def test_a_loss_that_is_nan_stops_with_the_untuned_codes() -> None:
    program = language_model()
    plain, _ = quantized(program)
    found = program.clone()
    pass_ = Quantize(
        "w6a8",
        calibration=text(program, 4, 1),
        tune="scales",
        tune_steps=5,
        tune_rate=1e30,
        tune_data=text(program, 16, 2),
    )
    with pytest.raises(LincompileError, match=r"tuning stopped, and the codes are as they were: .* isn't finite"):
        pass_.run(found)
    assert same(planes(plain), planes(found))


def test_the_float_model_and_its_gradients_are_left_alone() -> None:
    program = language_model()
    weights = planes(program)
    quantized(program, tune="codes", tune_steps=3, tune_data=text(program, 16, 2))
    assert same(weights, planes(program))
    assert all(p.grad is None and p.requires_grad for p in program.graph_module.parameters())


def test_a_table_and_its_head_keep_their_codes() -> None:
    program = language_model()
    plain, _ = quantized(program, embeddings=True)
    found, report = quantized(
        program,
        embeddings=True,
        tune="codes",
        tune_steps=60,
        tune_batch=4,
        tune_data=text(program, 112, 2),
    )
    assert report["tuning"]["kept"] and report["tuning"]["codes_changed"] > 0
    a, b = planes(plain), planes(found)
    table = [name for name in a if name.startswith("lm_head")]
    assert len(table) == 3 and all(torch.equal(a[name], b[name]) for name in table)


class Twice(nn.Module):
    """One layer called twice, a biased one, and no tokens: features in, features out."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(64, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
        return y


def test_layers_called_twice_and_inputs_that_are_no_tokens() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    program = capture(model, torch.randn(2, 8, 64))
    name = program.inputs[0].name
    mix = torch.randn(8, 64)
    data = [{name: torch.randn(2, 8 + i % 3, 8) @ mix} for i in range(40)]
    unseen = torch.randn(64, 8, 8) @ mix

    def error(student: Program) -> float:
        with torch.no_grad():
            return float((student(unseen) - model(unseen)).square().mean())

    plain, found = program.clone(), program.clone()
    Quantize("w6a16", calibration=data[:4]).run(plain)
    report = Quantize("w6a16", calibration=data[:4], tune="scales", tune_steps=60, tune_data=data).run(found).report
    assert report["tuning"]["layers"] == 2 and report["tuning"]["kept"]
    assert error(found) < 0.95 * error(plain)


def test_padding_counts_for_nothing() -> None:
    """Tokens under the mask can be anything: the result is the same."""
    module, example = zoo.build("llama")
    program = capture(module, example)
    roles = {item.role: item.name for item in program.inputs}
    assert {"tokens", "mask"} <= roles.keys()

    def padded(filler: int) -> list[dict[str, Tensor]]:
        batches = []
        for seed in range(6):
            tokens, mask = zoo.tokens(2, 12, seed=seed), torch.ones(2, 12, dtype=torch.long)
            tokens[0, 7:], mask[0, 7:] = filler, 0
            batch = {name: value[:1].expand(2, *value.shape[1:]) for name, value in program.example.items()}
            batches.append(batch | {roles["tokens"]: tokens, roles["mask"]: mask})
        return batches

    results = []
    for filler in (5, 9):
        student = program.clone()
        report = Quantize(
            "w6a8", min_in_features=8, method="rtn", tune="scales", tune_steps=4, tune_batch=2, tune_data=padded(filler)
        ).run(student)
        results.append((report.report["tuning"]["kl"], report.report["tuning"]["tokens"]))
    assert results[0] == results[1]
    assert results[0][1] == 4 * 2 * (7 + 12)


def test_a_seed_gives_one_result_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    program = language_model()

    def run(**options: Any) -> dict[str, Tensor]:
        data = text(program, 40, 2)
        student, _ = quantized(program, tune="codes", tune_steps=10, tune_batch=4, tune_data=data, **options)
        return planes(student)

    whole = run()
    assert same(whole, run()) and not same(whole, run(tune_seed=1))

    class Stop(Exception):
        pass

    def stop(step: int, expected: int, loss: float, rate: float) -> None:
        assert expected == 10 and loss > 0 and rate > 0
        if step == 6:
            raise Stop

    saved = tmp_path / "tuning.pt"
    student, report = quantized(program)
    weights = [layer["weight"] for layer in report["layers"]]
    options = TuneOptions(steps=10, batch=4, save_every=5)
    with pytest.raises(Stop):
        tune(program, student, weights, text(program, 40, 2), options, checkpoint=saved, progress=stop)
    found = tune(program, student, weights, text(program, 40, 2), options, checkpoint=saved)
    assert found["steps"] == 10 and found["resumed_at"] == 5
    assert same(planes(student), whole)
    with pytest.raises(LincompileError, match="belongs to a run with other options, data or another model"):
        tune(program, student, weights, text(program, 40, 2), options, checkpoint=saved)  # its codes have been tuned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "everything"}, "unknown tuning 'everything'; the choices are scales, codes"),
        ({"tune_steps": 5}, "tune_steps is about tuning: give tune='scales' or tune='codes', too"),
        ({"tune_batch": 4}, "tune_batch is about tuning: give tune='scales' or tune='codes', too"),
        ({"tune_rate": 0.5}, "tune_rate is about tuning: give tune='scales' or tune='codes', too"),
        ({"tune": "codes", "calibration": None}, "tuning needs text"),
        ({"tune": "codes", "tune_batch": 0}, "at least one batch per step"),
        ({"tune": "codes", "tune_rate": 0.0}, "a rate above 0"),
        ({"tune": "codes", "tune_steps": -1}, "can't take -1 steps"),
    ],
)
def test_bad_options_are_named_before_anything_happens(options: dict[str, Any], message: str) -> None:
    program = language_model()
    weights = planes(program)
    with pytest.raises(LincompileError, match=message):
        Quantize(**({"plan": "w6a8", "calibration": text(program, 4, 1)} | options)).run(program)
    assert same(weights, planes(program))


def test_one_batch_is_too_few() -> None:
    program = language_model()
    with pytest.raises(LincompileError, match="at least two batches of text, of which one is held out"):
        Quantize("w6a8", calibration=text(program, 1, 1), tune="scales").run(program)


def test_a_time_limits_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    program = language_model()
    steps: list[int] = []
    _, report = quantized(
        program,
        tune="scales",
        tune_time=0.5,
        tune_data=text(program, 16, 2),
        tune_progress=lambda step, *_: steps.append(step),
    )
    assert report["tuning"]["steps"] == len(steps) > 0 and report["tuning"]["seconds"] < 20
    assert report["tuning"]["measured"][-1][0] == len(steps)


def test_compile_tunes_and_says_so() -> None:
    module, example = zoo.build("nanogpt")
    ids = torch.randint(0, 97, (4000,), generator=torch.Generator().manual_seed(0))
    seen: list[str] = []

    class Told(Reporter):
        def advance(self, done: int, total: int, text: str) -> None:
            seen.append(f"{done}/{total} {text}")

    compiled = lincompile.compile(
        module, example=example, attn="gla", quant="w6a8", calibrate=ids, quant_tune="codes", quant_tune_steps=3,
        reporter=Told(),
    )  # fmt: skip
    tuning = compiled.manifest()["quantization"]["tuning"]
    assert tuning["steps"] == 3 and tuning["mode"] == "codes"
    assert any(line.startswith("3/3 KL ") and "tokens/s" in line for line in seen)
    assert tuning["kept"] or tuning["note"] in compiled.notes
    for options, message in (
        ({"quant_tune": "codes"}, "--quant-tune needs text to train on: add --calibrate FILE"),
        ({"quant_tune_steps": 3, "calibrate": ids}, "--quant-tune-steps is about tuning: add --quant-tune codes"),
        ({"quant_tune": "all", "calibrate": ids}, "unknown tuning 'all'"),
        ({"quant": "none", "quant_tune": "codes"}, "--quant-tune is about quantization: add --quant"),
    ):
        with pytest.raises(LincompileError, match=message):
            lincompile.compile(module, example=example, **({"attn": "gla", "quant": "w6a8"} | options))


def test_as_many_tokens_calibrate_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module, example = zoo.build("nanogpt")
    length = 64  # of its positions, and of a window
    ids = torch.randint(0, 97, (40 * length,), generator=torch.Generator().manual_seed(0))
    read: list[int] = []
    run = Quantize.run
    monkeypatch.setattr(
        Quantize, "run",
        lambda self, program: read.append(sum(next(iter(x.values())).numel() for x in self.calibration or ()))
        or run(self, program),
    )  # fmt: skip
    notes: list[str] = []

    class Told(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    def compiled(**options: Any) -> None:
        lincompile.compile(module, example=example, attn="softmax", quant="w6a8", reporter=Told(), **options)

    compiled(calibrate=ids, calibrate_tokens=5 * length)
    assert not any("calibrated on" in note for note in notes)
    compiled(calibrate=ids, calibrate_tokens=100 * length)
    assert any(f"calibrated on {len(ids):,} tokens: the text has no more" in note for note in notes)
    compiled(calibrate=ids)
    assert read[0] == 5 * length < read[1] <= len(ids) and read[2] == min(8192, len(ids)) // length * length
    for options, message in (
        ({"calibrate_tokens": 64}, "--calibrate-tokens needs text to take them from: add --calibrate FILE"),
        ({"calibrate_tokens": 0, "calibrate": ids}, "--calibrate-tokens 0: give at least one"),
        ({"calibrate_tokens": 64, "quant": "none"}, "--calibrate-tokens is about quantization: add --quant"),
    ):
        with pytest.raises(LincompileError, match=message):
            lincompile.compile(module, example=example, **({"attn": "softmax", "quant": "w6a8"} | options))


def test_stored_planes_are_those_of_the_report() -> None:
    """The signal-to-noise ratio in the report is that of the tuned codes."""
    program = language_model()
    found, report = quantized(program, tune="scales", tune_steps=20, tune_data=text(program, 40, 2))
    assert report["tuning"]["kept"]
    record, stored = report["layers"][0], planes(found)
    hi, lo, scale = (stored[record["weight"] + suffix] for suffix in ("_hi", "_lo", "_scale"))
    weight = dequantize(unpack(hi, lo, record["in_features"]), scale)
    exact = program.graph_module.get_parameter(record["weight"]).detach()
    noise = float((weight - exact).square().sum() / exact.square().sum())
    assert abs(-10 * torch.tensor(noise).log10() - record["sqnr_db"]) < 3  # smoothing scales some columns
