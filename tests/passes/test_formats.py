"""Sniffing, functions and live modules: what loads, what is refused, and with which words."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import zoo
from refusals import refusal
from safetensors.torch import save_file

from lincompile.passes.errors import ModelLoadError
from lincompile.passes.formats.load import find_packaged_model, load_model, sniff


def test_sniff_reads_content_and_never_names(tmp_path: Path) -> None:
    model = zoo.build("nanogpt", 3)[0]
    exported = torch.export.export(model, (zoo.tokens(),), strict=False)
    torch.export.save(exported, tmp_path / "p.pt2")
    traced = torch.jit.trace(model, (zoo.tokens(),))
    torch.jit.save(traced, str(tmp_path / "t"))
    torch.save(model.state_dict(), tmp_path / "s")
    torch.save(model.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.save(model, tmp_path / "m")
    save_file({"a": torch.ones(2)}, tmp_path / "st")
    (tmp_path / "g").write_bytes(b"GGUF" + bytes(60))
    expected = {
        "p.pt2": "pt2",
        "t": "torchscript",
        "s": "state_dict",
        "old": "state_dict",
        "m": "pickle",
        "st": "safetensors",
        "g": "gguf",
    }
    for name, kind in expected.items():
        for suffix in (".pt", ".gguf", ".safetensors"):
            disguised = tmp_path / f"disguised{suffix}"
            shutil.copy(tmp_path / name, disguised)
            assert sniff(disguised) == kind


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello world, this is no model", "not a model format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged zip"),
        (b"\x80\x02}q\x00(X\x10\x00", "truncated or damaged pickle"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    message = refusal(path)
    assert words in message
    assert str(path) in message


def test_missing_file_and_folders_without_a_model(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nowhere.pt")
    assert "no such file" in refusal("SomeOrg/some-model")
    assert "empty" in refusal("")
    assert "without config.json" in refusal(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "give one of its files: a.gguf" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter without its base model" in refusal(tmp_path)
    (tmp_path / "lincompile.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "lincompile"}')  # an artefact has one too
    assert "already compiled" in refusal(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "the weights of a compiled model" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("keep", [0.2, 0.7, 0.99])
def test_truncated_archives(tmp_path: Path, keep: float) -> None:
    model = zoo.build("nanogpt", 3)[0]
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    save_file(dict(model.state_dict()) | {"lm_head.weight": torch.ones(2)}, tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(whole[: int(len(whole) * keep)])
        assert "truncated or damaged" in refusal(cut, model="zoo:NanoGPT")


def test_truncated_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(zoo.build("nanogpt", 3)[0].state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "truncated or damaged" in refusal(path, model="zoo:NanoGPT")


def test_a_zip_that_is_no_model(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip archive without a model" in refusal(tmp_path / "z.pt")


def test_function_in_the_current_folder(here: Path) -> None:
    loaded = load_model("builders:build")
    assert (loaded.format, loaded.task, loaded.source) == ("function", "causal-lm", "builders:build")
    again = load_model("builders:build")
    assert loaded.source_hash == again.source_hash
    assert load_model("builders:deep").source_hash != loaded.source_hash
    assert load_model("builders:with_example").example["idx"].shape == (2, 9)
    assert str(here) not in sys.path


def test_functions_that_do_not_work(here: Path) -> None:
    assert "no module named 'nowhere'" in refusal("nowhere:build")
    assert "has no 'missing'" in refusal("builders:missing")
    assert "no weights today" in refusal("builders:fails")
    assert "returns a int" in refusal("builders:number")
    assert "not a function" in refusal("builders:constant")
    (here / "broken.py").write_text("import does_not_exist_anywhere")
    assert "importing 'broken' fails" in refusal("broken:build")
    assert "leave out --model" in refusal("builders:build", model="builders:build")


def test_original_nanogpt_returns_all_logits_and_no_loss(here: Path) -> None:
    loaded = load_model("builders:Original")
    assert loaded.task == "causal-lm"
    assert loaded.prefix == "model."
    assert loaded.max_positions == 32
    ids = loaded.example["input_ids"]
    logits = loaded.module(ids)
    assert logits.shape == (*ids.shape, zoo.VOCAB)
    inner = loaded.module.get_submodule("model")
    torch.testing.assert_close(logits[:, -1:], inner(ids)[0])
    exported = torch.export.export(loaded.module, (), dict(loaded.example), strict=False)
    assert not any("nll" in str(node.target) or "cross_entropy" in str(node.target) for node in used(exported))


def used(exported: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    graph = exported.module().graph
    graph.eliminate_dead_code()
    return list(graph.nodes)


@pytest.mark.parametrize("name", [n for n in zoo.NANOGPT if n not in ("nanogpt-bidirectional",)])
def test_live_nanogpt_gets_an_example(name: str) -> None:
    module, _ = zoo.build(name)
    loaded = load_model(module)
    assert (loaded.format, loaded.task) == ("module", "causal-lm")
    assert loaded.module is module
    assert all(p.requires_grad for p in loaded.module.parameters())


def test_bidirectional_is_no_causal_lm() -> None:
    assert load_model(zoo.build("nanogpt-bidirectional")[0]).task == "encoder"


def test_modules_that_need_an_example() -> None:
    module, example = zoo.build("torch-decoder")
    assert "also requires memory" in refusal(module)
    assert load_model(module, example=example).example.keys() == example.keys()
    module, example = zoo.build("torch-multihead")
    assert "pass example=" in refusal(module)
    assert load_model(module, example=example["x"]).task == "unknown"
    assert "forward fails on the example" in refusal(module, example=torch.ones(2, 3, 5))


def test_dtype_converts_a_copy() -> None:
    module = zoo.build("nanogpt", 3)[0]
    loaded = load_model(module, dtype=torch.float64)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float64}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    half = zoo.build("nanogpt", 3)[0].half()
    assert {p.dtype for p in load_model(half).module.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_training_mode_is_left() -> None:
    assert not load_model(zoo.build("nanogpt", 3)[0].train()).module.training


def test_packaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelLoadError, match="holds 0 models"):
        find_packaged_model("some-model")
    (package / "weights.gguf").write_bytes(b"GGUF")
    assert find_packaged_model("some-model") == package / "weights.gguf"
    with pytest.raises(ModelLoadError, match="isn't installed"):
        find_packaged_model("no-such-model-package")


def test_import_needs_no_transformers() -> None:
    import subprocess

    code = "import sys, lincompile.passes.formats.load; assert not {'transformers', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
