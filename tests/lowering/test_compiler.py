"""The pipeline end to end on small models: what is compiled, what is refused, and that nothing is done silently."""

from __future__ import annotations

import functools
from pathlib import Path

import induction_model
import pytest
import torch
import zoo
from torch import nn

import lincompile
from lincompile.lowering.compiler import prove, rewrite
from lincompile.lowering.evaluation.subject import open_subject
from lincompile.lowering.generate import generate
from lincompile.lowering.options import Options
from lincompile.passes.errors import LincompileError, ModelLoadError, RefusedError
from lincompile.passes.program import Program


def tokens(count: int, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attn", ["gla", "hedgehog", "lawcat", "gated-delta"])
def test_every_method_compiles_saves_and_continues(attn: str, tmp_path: Path) -> None:
    module, example = zoo.build("llama-gqa")
    compiled = lincompile.compile(module, example=example, attn=attn, quant="w6a8")
    assert [site.method for site in compiled.sites] == [attn, attn]
    assert compiled.step.max_error is not None and compiled.step.max_error < 1e-4
    artefact = lincompile.open(compiled.save(tmp_path / "out"))
    prompt = [5, 3, 1]
    assert artefact.generate(prompt, 6) == compiled.generate(prompt, 6)
    assert artefact.manifest["sites"][0]["method"] == attn
    assert artefact.manifest["quantization"]["plan"] == "w6a8"


def test_single_kv_heads_stay_softmax(tmp_path: Path) -> None:
    """One of three KV heads of the second layer, beside a window: in torch, saved, and in ONNX."""
    module, example = zoo.build("llama-gqa")
    compiled = lincompile.compile(
        module, example=example, attn="lawcat", keep_softmax="1.2", window=8, target="onnx", quant="w6a16"
    )
    methods = {site.path.rpartition(".")[2]: site.method for site in compiled.sites[1:]}
    assert methods == {"kv0_1": "lawcat", "kv2": "softmax"}
    folder = compiled.save(tmp_path / "out")
    prompt = [5, 3, 1, 8, 8, 2]
    expected = compiled.generate(prompt, 12)
    assert compiled._artefact is not None and not (compiled._artefact.directory / "onnx").exists(), "not exported again"
    assert lincompile.open(folder).generate(prompt, 12) == expected
    session = open_subject(str(folder), runtime="onnx").session
    assert generate(session, [prompt], 12).tokens[0][-12:] == expected[-12:]
    with pytest.raises(RefusedError, match=r"--keep-softmax 1\.3: '.*' has 3 KV heads \(0 to 2\)"):
        lincompile.compile(module, example=example, attn="lawcat", keep_softmax="1.3")


def test_kv_heads_that_look_back_are_chosen_and_recorded(tmp_path: Path) -> None:
    """As by name: sites, tokens and states; the manifest says which, with their scores, and a note does."""
    module, example = induction_model.build()
    same = {"example": example, "attn": "lawcat", "window": 8, "quant": "w6a16"}
    by_score, by_name = (lincompile.compile(module, keep_softmax=keep, **same) for keep in ("heads:1", "1.1"))
    assert [(site.path, site.method) for site in by_score.sites] == [(site.path, site.method) for site in by_name.sites]
    assert by_score.generate([5, 9, 7, 5], 6) == by_name.generate([5, 9, 7, 5], 6)
    manifest = lincompile.open(by_score.save(tmp_path / "out")).manifest
    (report,) = [entry["report"] for entry in manifest["passes"] if entry["pass"] == "choose-heads"]
    assert list(report["chosen"]) == ["1.1"] and set(report["scores"]) == {"layers.0", "layers.1"}
    assert any("--keep-softmax heads:1 keeps 1.1 (weight" in note for note in manifest["notes"])
    with pytest.raises(RefusedError, match=r"heads:5: the model has 4 KV heads to choose from: write a number from 1"):
        lincompile.compile(module, keep_softmax="heads:5", **same)
    with pytest.raises(RefusedError, match=r"beyond --window 40 is seen on 82 tokens or more, and the model takes 64"):
        lincompile.compile(module, keep_softmax="heads:1", **same | {"window": 40})


@pytest.mark.parametrize("keep", ["1.2", "heads:1"])
def test_heads_of_a_program_that_was_not_cut_apart_are_refused(keep: str) -> None:
    whole = prove(lincompile.capture(*zoo.build("llama-gqa")), Options())
    with pytest.raises(
        LincompileError, match=rf"--keep-softmax {keep}: the program's heads weren't cut apart by prove"
    ):
        rewrite(whole, Options(attn="lawcat", keep_softmax=keep))


def test_distillation_lowers_the_error_and_is_recorded() -> None:
    module, example = zoo.build("llama-gqa")
    compiled = lincompile.compile(
        module, example=example, attn="lawcat", distil=tokens(6000), tokens=16_384, length=64, batch=4
    )
    report = compiled.transfer
    assert report is not None and report.steps > 10
    assert all(report.after[path] < report.before[path] for path in report.before)
    assert compiled.sites[0].details["error_after"] == report.after[compiled.sites[0].path]
    assert not any("not distilled" in note for note in compiled.notes)


def test_without_distillation_the_result_says_so() -> None:
    module, example = zoo.build("nanogpt")
    compiled = lincompile.compile(module, example=example, attn="gla")
    assert any("not distilled" in note for note in compiled.notes)


def test_the_source_model_is_left_as_it_was() -> None:
    module, example = zoo.build("nanogpt")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    lincompile.compile(
        module, example=example, attn="lawcat", quant="int6", distil=tokens(2000), tokens=2048, length=64, batch=2
    )
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_kept_sites_carry_their_cache() -> None:
    module, example = zoo.build("llama-gqa")
    compiled = lincompile.compile(module, example=example, attn="lawcat", keep_softmax="0,")
    assert [site.method for site in compiled.sites] == ["softmax", "lawcat"]
    assert [spec.role for spec in compiled.step.states] == ["mask", "key", "value", "conv", "conv", "recurrent"]


def test_an_encoder_runs_whole_sequences() -> None:
    module, example = zoo.build("bert")
    compiled = lincompile.compile(module, example=example, attn="hedgehog")
    assert not compiled.step.causal and not compiled.step.states
    ids = torch.randint(0, 90, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    positions = torch.arange(9).expand(2, 9)
    out, _ = compiled.step(ids, positions, mask, [])
    names = [item.name for item in compiled.program.inputs]
    values = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": torch.zeros_like(ids)}
    wanted = compiled.program(**{name: values[name] for name in names})
    assert torch.allclose(out, wanted if isinstance(wanted, torch.Tensor) else wanted[0], atol=1e-6)


class Plain(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.inner = nn.Linear(128, 128)
        self.head = nn.Linear(128, 50)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.inner(self.embed(idx))))


def test_a_model_without_attention_is_refused_but_can_be_quantized() -> None:
    example = {"idx": torch.randint(0, 50, (2, 9))}
    with pytest.raises(RefusedError, match=r"no softmax attention.*--attn softmax --quant int6"):
        lincompile.compile(Plain(), example=example, attn="lawcat")
    compiled = lincompile.compile(Plain(), example=example, attn="softmax", quant="w6a8")
    assert compiled.program.metadata["quantization"]["layers"]


def test_a_model_whose_every_site_is_refused_says_why() -> None:
    module, example = zoo.build("bert")
    with pytest.raises(RefusedError, match=r"no attention site can be rewritten to gla.*bidirectional"):
        lincompile.compile(module, example=example, attn="gla")


def test_weights_with_nan_are_named() -> None:
    module, example = zoo.build("nanogpt")
    name, weight = next((n, p) for n, p in module.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(ModelLoadError, match=f"NaN.*{name.split('.')[-1]}"):
        lincompile.compile(module, example=example, attn="gla")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn": "linformer"}, "unknown attention method 'linformer'.*lawcat"),
        ({"quant": "int5"}, "int5"),
        ({"keep_softmax": "many"}, "--keep-softmax many"),
        ({"keep_softmax": "heads:none"}, "--keep-softmax heads:none: write how many KV heads to keep"),
        ({"keep_softmax": "heads:2", "attn": "softmax"}, "chooses among what would be rewritten"),
        ({"keep_softmax": "7,"}, "has 2 attention sites"),
        ({"target": "tpu"}, "--target tpu"),
        ({"colour": "red"}, "no option 'colour'"),
        ({"attn": "softmax", "distil": "x.txt"}, "nothing to train"),
        ({"distil": "no-such-file.txt"}, "no-such-file.txt doesn't exist"),
        ({"distil": [1.5]}, "item 1 of the list holds a float where text is wanted"),
    ],
)
def test_bad_options_are_one_line_errors(options: dict[str, object], message: str) -> None:
    module, example = zoo.build("nanogpt")
    with pytest.raises(LincompileError, match=message) as caught:
        lincompile.compile(module, example=example, **{"attn": "gla", **options})
    assert "\n" not in str(caught.value)


class Wider(nn.Module):
    """Rotary attention by hand that runs in another dtype than the rest of the model."""

    def __init__(self, inner: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = inner
        self.embed, self.qkv, self.head = nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2).to(self.inner) for y in self.qkv(x).chunk(3, -1))
        angle = torch.arange(ids.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001] * 2)
        cos, sin = angle.cos().to(self.inner), angle.sin().to(self.inner)
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
        hidden = ~torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.head(x + (weights @ v).to(x.dtype).transpose(1, 2).flatten(2))


@functools.cache
def in_one_dtype(attn: str, window: int | None) -> Program:
    """What students of wider attention are compared with, whatever is wider about them."""
    return lincompile.compile(Wider(torch.float32), example=torch.zeros(2, 9).long(), attn=attn, window=window).program


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("attn", ["gla", "lawcat", "hedgehog", "gated-delta"])
@pytest.mark.parametrize(("dtype", "inner"), [("bfloat16", torch.float32), ("float32", torch.float64)])
def test_attention_in_a_wider_dtype_than_the_model(
    attn: str, window: int | None, dtype: str, inner: torch.dtype, tmp_path: Path
) -> None:
    """Gates, shares and convolutions are the attention's, the hidden states that they read the model's."""
    ids = torch.randint(0, 64, (2, 9))
    compiled = lincompile.compile(Wider(inner), example=ids, attn=attn, window=window, dtype=dtype)
    added = [p for n, p in compiled.program.graph_module.named_parameters() if n.startswith("lincompile_attention")]
    assert {p.dtype for p in added} == {inner} and compiled.step.causal
    close = {"rtol": 0.05, "atol": 0.02} if dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(compiled.program(ids).float(), in_one_dtype(attn, window)(ids), **close)
    artefact = lincompile.open(compiled.save(tmp_path / "out"))
    one = torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        out, _ = artefact.step(ids, torch.arange(9).expand(2, 9), one, compiled.step.initial_states(2))
        torch.testing.assert_close(out, compiled.program(ids), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("dtype", "inner"), [("bfloat16", torch.float32), ("float32", torch.float64)])
def test_attention_in_a_wider_dtype_is_distilled(dtype: str, inner: torch.dtype) -> None:
    options = {"attn": "lawcat", "window": 4, "distil": tokens(2000, 64), "tokens": 1024, "length": 32, "batch": 2}
    compiled = lincompile.compile(
        Wider(inner), example=torch.randint(0, 64, (2, 9)), dtype=dtype, train="full", **options
    )
    assert compiled.transfer is not None
    assert sum(compiled.transfer.after.values()) < sum(compiled.transfer.before.values())
