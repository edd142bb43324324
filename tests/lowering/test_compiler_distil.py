"""Distillation through ``lincompile.compile``: stages, layer choice, adapters, and what is refused before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from distil_models import LENGTH, linear, mean, proved, text, windows
from safetensors import safe_open
from safetensors.torch import save_file

import lincompile
from lincompile.lowering.options import Options, check_checkpoint
from lincompile.passes.distil.adapter import save_adapter
from lincompile.passes.distil.logits import LogitDistillation, distil_logits
from lincompile.passes.distil.transfer import Errors, Transfer, transfer
from lincompile.passes.errors import LincompileError
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.split_heads import SplitHeads, named_parts


def model() -> torch.nn.Module:
    module = zoo.build("nanogpt-gqa-flag")[0]
    with torch.no_grad():
        for block in module.h:  # as distil_models.proved
            block.attn.c_attn.weight.mul_(8)
    return module


def test_layer_choice_and_logit_distillation_reach_the_manifest(tmp_path: Path) -> None:
    compiled = lincompile.compile(
        model(),
        example={"idx": zoo.tokens()},
        distil=text(),
        keep_softmax="auto:1",
        train="lora:2",
        tokens=20 * 2 * LENGTH,
        length=LENGTH,
        batch=2,
    )
    assert [site.method for site in compiled.sites].count("softmax") == 1
    manifest = json.loads((compiled.save(tmp_path / "out") / "lincompile.json").read_text())
    done = manifest["distillation"]
    assert done["tokens"] == 7 * 2 * LENGTH and done["logits"]["tokens"] == 13 * 2 * LENGTH
    assert manifest["sites"][done["choice"]["kept"][0]]["method"] == "softmax"
    assert set(done["choice"]["restored"]) == set(done["before"]) == set(done["after"])


def test_an_adapter_takes_the_place_of_training(tmp_path: Path) -> None:
    teacher = proved()
    student = linear(teacher)
    transfer(teacher, student, windows(), Transfer(steps=25))
    distil_logits(teacher, student, windows(), LogitDistillation(steps=5, train="lora:2"))
    file = tmp_path / "a.safetensors"
    save_adapter(file, teacher, student, record={"tokens": 480})
    compiled = lincompile.compile(model(), example={"idx": zoo.tokens()}, adapter=str(file))
    tokens = windows().step(0)
    with torch.no_grad():
        trained, untrained = student(tokens), linear(teacher)(tokens)
        assert (compiled.program(tokens) - trained).norm() < 0.05 * (untrained - trained).norm()
    assert compiled.manifest()["adapter"] == {"file": "a.safetensors", "tokens": 480}
    assert not any("not distilled" in note for note in compiled.notes)
    on: dict[str, Any] = {"adapter": str(file), "distil": text(), "tokens": 4 * LENGTH, "length": LENGTH}
    # Its projections aren't the teacher's any more: only the logits can go on from there.
    with pytest.raises(LincompileError, match=r"projections aren't the teacher's.*--train lora:R or --train full"):
        lincompile.compile(model(), example={"idx": zoo.tokens()}, **on)
    with pytest.raises(LincompileError, match=r"--transfer-loss mse: .* only the logits can go on, not attention tran"):
        lincompile.compile(model(), example={"idx": zoo.tokens()}, train="lora:2", transfer_loss="mse", **on)
    further = lincompile.compile(model(), example={"idx": zoo.tokens()}, train="lora:2", **on)
    assert further.transfer is not None and further.transfer.steps == 0
    assert further.distilled is not None and further.distilled.logits is not None and further.distilled.logits.steps > 0
    fresh = Errors(teacher, linear(teacher)).by_path(windows().measure(4))
    assert mean(further.transfer.before) < 0.95 * mean(fresh)  # it began where the adapter ended


def test_an_adapter_says_which_sites_it_is_for(tmp_path: Path) -> None:
    """The window beside it and the heads that stay softmax needn't be written again; what is asked for comes first."""
    teacher = Pipeline([SplitHeads(((1, 0),))])(proved())
    student = linear(teacher, window=4, keep=named_parts(teacher))
    transfer(teacher, student, windows(), Transfer(steps=2))
    file = tmp_path / "a.safetensors"
    save_adapter(file, teacher, student)
    compiled = lincompile.compile(model(), example={"idx": zoo.tokens()}, adapter=str(file))
    options = compiled.manifest()["options"]
    assert (options["window"], options["keep_softmax"]) == (4, "1.0")
    assert [site.method for site in compiled.sites] == [site.method for site in student.sites]
    tokens = windows().step(0)
    with torch.no_grad():
        torch.testing.assert_close(compiled.program(tokens), student(tokens), rtol=3e-2, atol=3e-2)
    for other in ({"window": 5}, {"keep_softmax": "0.0"}, {"attn": "gla"}):
        with pytest.raises(LincompileError, match=r"give --attn lawcat --window 4 --keep-softmax 1\.0$"):
            lincompile.compile(model(), example={"idx": zoo.tokens()}, adapter=str(file), **other)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(LincompileError, match="is damaged or isn't a safetensors file"):
        lincompile.compile(model(), example={"idx": zoo.tokens()}, adapter=str(file))


def attend_with_alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None, :]
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)[:, None, None]
    bias = (-slopes * distance).masked_fill(distance < 0, -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize(("option", "attn"), [("rewrite_sliding", "lawcat"), ("alibi", "gla")])
def test_an_adapter_brings_the_option_its_sites_are_rewritten_by(option: str, attn: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    alibi = (zoo.NanoGPT(attend_with_alibi).eval(), {"idx": zoo.tokens()})
    module, example = alibi if option == "alibi" else zoo.build("gemma3")
    asked: dict[str, Any] = {"example": example, "attn": attn}
    compiled = lincompile.compile(module, **{option: True}, **asked)
    assert {site.method for site in compiled.sites} == {attn}
    file = tmp_path / "a.safetensors"
    save_adapter(file, compiled.teacher, compiled.program)
    applied = lincompile.compile(module, adapter=str(file), **asked)
    assert {site.method for site in applied.sites} == {attn} and applied.manifest()["options"][option]
    with safe_open(str(file), "pt") as opened:
        metadata, tensors = dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del metadata["switches"], metadata["contents"]  # as the first adapters of this format are
    save_file(tensors, str(file), metadata)
    with pytest.raises(LincompileError, match=f"--{option.replace('_', '-')}"):
        lincompile.compile(module, adapter=str(file), **asked)


def test_training_goes_on_from_an_adapter_of_attention_alone(tmp_path: Path) -> None:
    teacher = proved()
    student = linear(teacher)
    transfer(teacher, student, windows(), Transfer(steps=15))
    file = tmp_path / "a.safetensors"
    save_adapter(file, teacher, student)
    further = lincompile.compile(
        model(), example={"idx": zoo.tokens()}, adapter=str(file), distil=text(), tokens=4 * LENGTH, length=LENGTH
    )
    assert further.transfer is not None and further.transfer.steps == 4


def test_chosen_heads_train_and_an_adapter_names_them(tmp_path: Path) -> None:
    example = {"idx": zoo.tokens()}
    budget: dict[str, Any] = {"distil": text(), "tokens": 8 * LENGTH, "length": LENGTH, "train": "lora:2"}
    compiled = lincompile.compile(model(), example=example, keep_softmax="heads:1", **budget)
    (report,) = [entry["report"] for entry in compiled.manifest()["passes"] if entry["pass"] == "choose-heads"]
    (name,) = report["chosen"]
    assert [s.path.rpartition(".")[2] for s in compiled.sites if s.method == "softmax"] == [f"kv{name[-1]}"]
    assert compiled.distilled is not None and compiled.distilled.logits is not None
    file = tmp_path / "heads.safetensors"
    save_adapter(file, compiled.teacher, compiled.program)
    applied = lincompile.compile(model(), example=example, adapter=str(file))
    assert applied.options.keep_softmax == name
    assert [site.path for site in applied.sites] == [site.path for site in compiled.sites]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_softmax": "auto:2"}, "auto:N chooses layers by what they are worth after training: add --distil FILE"),
        ({"train": "some"}, "--train some: write none, full, or lora:R"),
        ({"adapter": "missing"}, "the adapter missing doesn't exist"),
        ({"adapter": "a", "time": 5.0}, "to train on from an adapter, add --distil FILE"),
        ({"adapter": "a", "attn": "softmax"}, "--adapter holds linear attention"),
        (
            {"adapter": "a", "keep_softmax": "auto:1", "distil": "t"},
            "--adapter says which sites stay softmax: leave --keep-softmax out",
        ),
        (
            {"adapter": "a", "keep_softmax": "heads:2"},
            "--adapter says which KV heads stay softmax: leave --keep-softmax out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        Options(**options).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_softmax": "0,"}, "--keep-softmax 0, chooses among what would be rewritten; with --attn softmax"),
        ({"keep_softmax": "1.0"}, "--keep-softmax 1.0 chooses among what would be rewritten; with --attn softmax"),
        ({"window": 8}, "--window stands beside linear attention; with --attn softmax there is none"),
        ({"rotary": "keep"}, "--rotary keep says what linear attention reads; with --attn softmax there is none"),
        ({"rewrite_sliding": True}, "--rewrite-sliding: with --attn softmax nothing is rewritten"),
    ],
)
def test_options_of_rewriting_need_something_to_rewrite(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        Options(attn="softmax", **options).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "w6a8", "calibrate": "t"}, "--quant w6a8 gives every layer the same scheme"),
        ({"quant": "int6", "calibrate": "t", "target": "onnx"}, "--quant int6 for ONNX gives every layer the same"),
        ({"quant": "int6"}, "--quant-scores needs text to score on: add --calibrate FILE"),
    ],
)
def test_scores_need_a_plan_that_reads_them(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        Options(quant_scores="scores.json", **options).check()


def test_all_stages_with_their_options_reach_the_manifest() -> None:
    compiled = lincompile.compile(
        model(),
        example={"idx": zoo.tokens()},
        distil=text(),
        attn="hedgehog",
        train="lora:2",
        transfer_loss="both",
        extend=64,
        retrieval=0.5,
        echoes=0.25,
        cross_entropy=0.5,
        tokens=20 * 4 * LENGTH,
        length=LENGTH,
        batch=4,
    )
    done = compiled.manifest()["distillation"]
    assert done["extension"]["tokens"] == 4 * 64 and done["logits"]["steps"] > 0 and done["steps"] > 0
    options = compiled.manifest()["options"]
    assert (options["transfer_loss"], options["extend"], options["retrieval"]) == ("both", 64, 0.5)
    assert options["echoes"] == 0.25 and options["cross_entropy"] == 0.5


def test_an_extension_beyond_the_positions_is_refused() -> None:
    with pytest.raises(LincompileError, match=r"--extend 5000: the model has \d+ positions; write at most that"):
        lincompile.compile(
            model(), example={"idx": zoo.tokens()}, distil=text(), train="full", extend=5000, length=LENGTH
        )


def test_what_only_the_model_can_refuse_is_refused_before_training() -> None:
    given: dict[str, Any] = {"example": {"idx": zoo.tokens()}, "distil": text(), "tokens": 10**9}
    with pytest.raises(LincompileError, match=r"--length 5000: the model has \d+ positions; write at most that"):
        lincompile.compile(model(), length=5000, **given)
    with pytest.raises(LincompileError, match="auto:2 would leave nothing linear: 2 sites of the model can be"):
        lincompile.compile(model(), keep_softmax="auto:2", length=LENGTH, **given)
    with pytest.raises(LincompileError, match="--keep-softmax auto:0: write a number"):
        lincompile.compile(model(), keep_softmax="auto:0", length=LENGTH, **given)
    del given["distil"], given["tokens"]
    with pytest.raises(LincompileError, match="--checkpoint is about distillation: add --distil FILE"):
        lincompile.compile(model(), checkpoint=Path("run.ckpt"), **given)


def test_a_checkpoint_that_would_never_be_written_is_refused_before_loading(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    adapted = Options(adapter=str(tmp_path / "a.safetensors"), distil=text())
    with pytest.raises(LincompileError, match="--checkpoint: with an adapter --distil only calibrates"):
        check_checkpoint(tmp_path / "run.ckpt", adapted)
    check_checkpoint(tmp_path / "run.ckpt", Options(distil=text()))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"], "trying leaves nothing behind"
    for wrong in (tmp_path / "nowhere" / "run.ckpt", tmp_path):
        with pytest.raises(LincompileError, match=r"the checkpoint .* can't be written \(.*\): choose another place"):
            lincompile.compile("no model at all", distil=text(), checkpoint=wrong)


def test_text_to_calibrate_on_holds_no_token_below_zero() -> None:
    with pytest.raises(LincompileError, match=r"holds token -5, and the model knows \d+: give other text"):
        lincompile.compile(
            model(), example={"idx": zoo.tokens()}, quant="w6a8", calibrate=torch.tensor([3, 4, -5, 6] * 9)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extend": 64}, "--extend is about distillation: add --distil FILE"),
        ({"seed": 1 << 63}, "--seed 9223372036854775808: a seed lies between"),
        ({"train": "lora:²", "distil": "t"}, "--train lora:²: write none, full, or lora:R"),
        ({"transfer_loss": "mse"}, "--transfer-loss is about distillation: add --distil FILE"),
        ({"transfer_loss": "l2", "distil": "t"}, "--transfer-loss l2: the choice is mse, weights, both"),
        ({"echoes": 0.5}, "--echoes is about distillation: add --distil FILE"),
        ({"echoes": 1.5, "distil": "t"}, "--echoes 1.5: the share of windows that repeat spans is from 0 to 1"),
        ({"retrieval": 0.1, "distil": "t"}, "--retrieval is a share, .* of --extend's windows: add --extend LENGTH"),
        ({"retrieval": 3.0, "extend": 9, "distil": "t"}, "--retrieval is a share, above 0 and up to 1"),
        ({"cross_entropy": 1.5, "distil": "t", "train": "full"}, "--cross-entropy 1.5: the text's own share is from 0"),
        ({"cross_entropy": 0.5, "train": "full"}, "--cross-entropy is a share of what --train learns: add --distil"),
        ({"cross_entropy": 0.5, "distil": "t"}, "--cross-entropy is a share of what --train learns: add --distil"),
        ({"needles": "keys", "distil": "t"}, "--needles keys: the choice is facts, passkeys"),
        ({"needles": "passkeys", "distil": "t"}, "--needles passkeys says what .*: add --extend LENGTH --retrieval"),
        ({"stretch": 4, "distil": "t"}, "--stretch 4 is about retrieval examples: add --retrieval SHARE"),
        ({"stretch": 0.5, "distil": "t"}, "--stretch 0.5: text between facts counts 1 to 1,048,576 times"),
        (
            {"stretch": 4, "retrieval": 0.5, "extend": 64, "distil": "t", "attn": "gated-delta"},
            "--stretch 4: a token of gated-delta that comes again isn't the token scaled: leave it out, or choose gla",
        ),
        ({"tokens": 1000}, "--tokens is about distillation: add --distil FILE"),
        ({"length": 64}, "--length is about distillation: add --distil FILE"),
        ({"batch": 0, "distil": "t"}, "--batch 0: give a number above 0"),
        ({"tokens": -5, "distil": "t"}, "--tokens -5: give a number above 0"),
        ({"dtype": "float16", "distil": "t"}, "small gradients would vanish in float16; give bfloat16 or float32"),
        *(
            ({"adapter": "a", "distil": "t", **how}, "with an adapter --distil only calibrates; to train on from it")
            for how in (
                {"extend": 64},
                {"echoes": 0.5},
                {"batch": 2},
                {"transfer_loss": "mse"},
                {"shard": "sp"},
                {"cross_entropy": 0.5, "device": "cuda"},  # where --train would be full if anything were trained
            )
        ),
    ],
)
def test_options_of_the_stages_are_checked_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        Options(**options).check()
