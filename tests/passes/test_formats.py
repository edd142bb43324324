"""Sniffing, and every kind of file that isn't Hugging Face's: what loads, what is refused, and with which words."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import nn

from lincompile.passes.capture import from_exported
from lincompile.passes.errors import LincompileError, ModelLoadError
from lincompile.passes.formats.load import check_finite, find_packaged_model, load_model, sniff

BUILDERS = """
import torch, zoo
def build():
    torch.manual_seed(7)
    return zoo.NanoGPT().eval()
def with_example():
    return build(), torch.ones(2, 9, dtype=torch.long)
def wide():
    return zoo.NanoGPT(width=64)
def deep():
    return zoo.NanoGPT(layers=3)
def fails():
    raise RuntimeError("no weights today")
def number():
    return 3
constant = 4
class Original(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.block_size = 32
        self.inner = zoo.NanoGPT(last_only=True)
    def forward(self, idx, targets=None):
        return self.inner(idx, targets)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module 'builders' that isn't installed anywhere."""
    (tmp_path / "builders.py").write_text(BUILDERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "builders", raising=False)
    yield tmp_path
    sys.modules.pop("builders", None)


def nano(seed: int = 3) -> nn.Module:
    return zoo.build("nanogpt", seed)[0]


def refusal(*args: Any, **kwargs: Any) -> str:
    """The message of the error that loading must raise: one line, of the family the CLI prints."""
    with pytest.raises(LincompileError) as caught:
        load_model(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


class Payload:
    """Pickles as a call that creates a file: loading it safely must not."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


# --- sniffing --------------------------------------------------------------------------------------------------------


def test_sniff_reads_content_and_never_names(tmp_path: Path) -> None:
    model = nano()
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
    (tmp_path / "lincompile.json").write_text("{}")
    assert "already compiled" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter without its base model" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0.2, 0.7, 0.99])
def test_truncated_archives(tmp_path: Path, keep: float) -> None:
    model = nano()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    save_file(dict(model.state_dict()) | {"lm_head.weight": torch.ones(2)}, tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(whole[: int(len(whole) * keep)])
        assert "truncated or damaged" in refusal(cut, model="zoo:NanoGPT")


def test_truncated_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(nano().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "truncated or damaged" in refusal(path, model="zoo:NanoGPT")


def test_a_zip_that_is_no_model(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip archive without a model" in refusal(tmp_path / "z.pt")


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_with_a_builder(here: Path, legacy: bool) -> None:
    model = nano()
    torch.save(model.state_dict(), here / "model.pt", _use_new_zipfile_serialization=not legacy)
    loaded = load_model(here / "model.pt", model="builders:build")
    assert (loaded.format, loaded.task, loaded.max_positions) == ("state_dict", "causal-lm", zoo.BLOCK)
    assert loaded.prefix == ""
    assert list(loaded.example) == ["idx"]
    assert loaded.example["idx"].shape[0] == 2
    assert loaded.example["idx"].shape[1] >= 8
    assert not loaded.module.training
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)
    assert len(loaded.source_hash) == 64


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_stripped_with_a_note(here: Path, prefix: str) -> None:
    model = nano()
    torch.save({prefix + k: v for k, v in model.state_dict().items()}, here / "model.pt")
    loaded = load_model(here / "model.pt", model="builders:build")
    assert any("stripped" in note for note in loaded.notes)
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)


def test_checkpoint_with_the_weights_inside(here: Path) -> None:
    model = nano()
    torch.save({"model": model.state_dict(), "iter": 7, "optimizer": {"lr": 0.1}}, here / "ckpt.pt")
    loaded = load_model(here / "ckpt.pt", model="builders:build")
    assert "the checkpoint's 'model'" in loaded.notes[0]
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)


def test_safetensors_with_a_builder_and_a_tied_head(here: Path) -> None:
    model = nano()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, here / "weights.bin")
    loaded = load_model(here / "weights.bin", model="builders:build")
    assert loaded.format == "safetensors"
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)


def test_state_dict_without_a_builder_says_how_to_give_one(here: Path) -> None:
    torch.save(nano().state_dict(), here / "model.pt")
    assert "--model module:function" in refusal(here / "model.pt")


def test_missing_unexpected_and_misshapen_tensors_are_listed(here: Path) -> None:
    torch.save(nano().state_dict(), here / "model.pt")
    message = refusal(here / "model.pt", model="builders:deep")
    assert "12 missing (h.2.attn.c_attn.bias" in message
    assert "(12 in all)" in message
    message = refusal(here / "model.pt", model="builders:wide")
    assert "of another shape" in message
    assert "h.0.attn.c_attn.bias [96] instead of [192]" in message
    state = nano().state_dict()
    state["h.9.extra"] = torch.ones(2)
    torch.save(state, here / "more.pt")
    assert "1 unexpected (h.9.extra)" in refusal(here / "more.pt", model="builders:build")


def test_not_a_state_dict(here: Path) -> None:
    torch.save([1, 2, 3], here / "list.pt")
    assert "holds a list" in refusal(here / "list.pt", model="builders:build")
    torch.save({"epoch": 3}, here / "dict.pt")
    assert "with the keys epoch" in refusal(here / "dict.pt", model="builders:build")


def test_nan_in_the_weights_is_named(here: Path) -> None:
    state = nano().state_dict()
    state["h.1.mlp.0.weight"][3, 4] = float("nan")
    torch.save(state, here / "model.pt")
    message = refusal(here / "model.pt", model="builders:build")
    assert "1 NaN" in message
    assert "h.1.mlp.0.weight" in message


def test_infinity_is_refused_in_weights_but_not_in_masks() -> None:
    check_finite(zoo.build("nanogpt-additive-buffer")[0])  # holds a mask of -inf
    model = nano()
    with torch.no_grad():
        model.get_parameter("ln_f.bias")[0] = float("inf")
    with pytest.raises(ModelLoadError, match=r"1 infinite values in 'ln_f.bias'"):
        check_finite(model)
    buffered = zoo.build("nanogpt-additive-buffer")[0]
    buffered.get_submodule("h.0.attn").mask[0, 0] = float("nan")
    with pytest.raises(ModelLoadError, match=r"h.0.attn.mask"):
        check_finite(buffered)


def test_sums_that_overflow_are_no_infinities() -> None:
    module = nn.Linear(64, 64, dtype=torch.float16)
    with torch.no_grad():
        module.weight.fill_(60000.0)
    check_finite(module)


# --- pickles ---------------------------------------------------------------------------------------------------------


def torch_only_model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation=nn.functional.gelu)
    return nn.Sequential(nn.Embedding(31, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 31)).eval()


def test_pickled_torch_modules_load_without_trust(tmp_path: Path) -> None:
    model = torch_only_model()
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert (loaded.format, loaded.task) == ("pickle", "encoder")
    ids = loaded.example["input"]
    torch.testing.assert_close(loaded.module(ids), model(ids))


def test_modules_in_the_format_of_before_torch_1_6_need_trust(tmp_path: Path) -> None:
    model = torch_only_model()
    torch.save(model, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert "--trust" in refusal(tmp_path / "model.pt")  # torch's safe unpickler can't read modules of that format
    loaded = load_model(tmp_path / "model.pt", trust=True)
    ids = loaded.example["input"]
    torch.testing.assert_close(loaded.module(ids), model(ids))


def test_pickled_user_classes_are_refused_by_name_and_load_with_trust(tmp_path: Path) -> None:
    model = nano()
    torch.save(model, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "zoo.NanoGPT" in message
    assert "--trust" in message
    assert "torch.nn" not in message  # only what isn't allowed is listed
    loaded = load_model(tmp_path / "model.pt", trust=True)
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", ["bare", "zip", "legacy", "in a state dict", "protocol 4", "beside allowed classes"])
def test_a_payload_is_never_run(tmp_path: Path, shape: str) -> None:
    target = tmp_path / "created"
    path = tmp_path / "model.pt"
    payload = Payload(target)
    if shape == "bare":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif shape == "protocol 4":
        torch.save({"w": torch.ones(1), "x": payload}, path, pickle_protocol=4)
    elif shape == "in a state dict":
        torch.save(OrderedDict(w=torch.ones(2), x=payload), path)
    elif shape == "beside allowed classes":
        model = torch_only_model()
        model.extra = payload  # type: ignore[assignment]
        torch.save(model, path)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=shape == "zip")
    message = refusal(path)
    assert "mkdir" in message
    assert not target.exists()


def test_a_payload_behind_a_builder_is_not_run(here: Path) -> None:
    torch.save({"w": torch.ones(1), "x": Payload(here / "created")}, here / "model.pt")
    assert "leave --model out" in refusal(here / "model.pt", model="builders:build")
    assert not (here / "created").exists()


def test_an_allowed_name_does_not_open_other_names_of_its_module(tmp_path: Path) -> None:
    class Sneaky:
        def __reduce__(self) -> Any:
            import torch.nn.modules.module as m

            return m.torch.save, (torch.ones(1), str(tmp_path / "created"))

    torch.save(Sneaky(), tmp_path / "model.pt")
    refusal(tmp_path / "model.pt")
    assert not (tmp_path / "created").exists()


def test_pickled_class_that_is_not_here(tmp_path: Path) -> None:
    torch.save(nano(), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        for name in old.namelist():
            new.writestr(
                name, old.read(name).replace(b"czoo\n", b"czox\n") if name.endswith("data.pkl") else old.read(name)
            )
    assert "can't be found here" in refusal(tmp_path / "new.pt", trust=True)


# --- exported programs and TorchScript -------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def dynamic_program(model: nn.Module) -> torch.export.ExportedProgram:
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return torch.export.export(model, (zoo.tokens(),), dynamic_shapes=(dims,), strict=False)


def test_exported_program_renamed_pt(tmp_path: Path) -> None:
    model = nano()
    torch.export.save(dynamic_program(model), tmp_path / "p.pt2")
    shutil.move(tmp_path / "p.pt2", tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.format == "pt2"
    assert loaded.exported is not None
    assert list(loaded.example) == ["idx"]
    other = zoo.tokens(3, 21)
    torch.testing.assert_close(loaded.module(other), model(other), rtol=0, atol=0)
    torch.testing.assert_close(loaded.module(**loaded.example), model(**loaded.example), rtol=0, atol=0)
    assert not loaded.module.eval().training
    assert "the program takes idx, the example has x" in refusal(tmp_path / "model.pt", example={"x": other})
    assert count(loaded.module) == count(model)  # the tied head is one parameter again
    assert count(from_exported(loaded.exported).graph_module) == count(model)


def rewritten(path: Path, target: Path, change: dict[str, bytes]) -> Path:
    """A copy of a torch archive with some members replaced."""
    with torch.serialization._open_zipfile_reader(str(path)) as reader:
        records = {name: bytes(reader.get_record(name)) for name in reader.get_all_records()}
    writer = torch._C.PyTorchFileWriter(str(target))
    for name, data in (records | change).items():
        if not name.startswith(".data") and name != "byteorder" and name != ".format_version":
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return target


@pytest.mark.parametrize(
    "member", ["data/sample_inputs/model.pt", "data/weights/evil.json", "data/constants/opaque_obj_0"]
)
def test_a_payload_inside_a_pt2_is_never_run(tmp_path: Path, member: str) -> None:
    torch.export.save(dynamic_program(nano()), tmp_path / "p.pt2")
    payload = tmp_path / "payload"
    torch.save((Payload(tmp_path / "created"), {}), payload)
    change = {member: payload.read_bytes()}
    if "weights" in member:
        name = "data/weights/model_weights_config.json"
        with torch.serialization._open_zipfile_reader(str(tmp_path / "p.pt2")) as reader:
            table = json.loads(reader.get_record(name))
        table["config"]["more"] = table["config"]["ln_f.bias"] | {"path_name": "evil.json", "use_pickle": True}
        change[name] = json.dumps(table).encode()
    if "constants" in member:
        change[member] = pickle.dumps(Payload(tmp_path / "created"))
        change["data/constants/model_constants_config.json"] = (
            b'{"config": {"x": {"path_name": "opaque_obj_0", "is_param": false, "use_pickle": true}}}'
        )
    path = rewritten(tmp_path / "p.pt2", tmp_path / "evil.pt2", change)
    message = refusal(path)
    assert member in message
    assert "--trust" in message
    assert not (tmp_path / "created").exists()


def test_damaged_exported_program(tmp_path: Path) -> None:
    torch.export.save(dynamic_program(nano()), tmp_path / "p.pt2")
    path = rewritten(tmp_path / "p.pt2", tmp_path / "q.pt2", {"models/model.json": b"{}"})
    assert "export it again" in refusal(path)
    assert "leave --model out" in refusal(tmp_path / "p.pt2", model="builders:build")


def test_torchscript_is_converted_and_stays_dynamic(tmp_path: Path) -> None:
    model = nano()
    torch.jit.save(torch.jit.trace(model, (zoo.tokens(),)), str(tmp_path / "model.pt"))
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.format == "torchscript"
    assert loaded.exported is not None
    other = zoo.tokens(3, 20)
    torch.testing.assert_close(loaded.module(other), model(other), rtol=1e-4, atol=1e-5)
    assert count(from_exported(loaded.exported).graph_module) == count(model)


class Loops(nn.Module):
    """Scripting keeps the loop over the data, which no exported graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.embed(idx)
        while bool(x.sum() > 100.0):
            x = x / 2
        return x


def test_torchscript_that_cannot_be_converted_names_the_way_out(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Loops()), str(tmp_path / "model.pt"))
    message = refusal(tmp_path / "model.pt")
    assert "torch.export.save" in message
    assert "--model module:function" in message


# --- functions and live modules --------------------------------------------------------------------------------------


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
    module = nano()
    loaded = load_model(module, dtype=torch.float64)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float64}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    half = nano().half()
    assert {p.dtype for p in load_model(half).module.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_training_mode_is_left() -> None:
    assert not load_model(nano().train()).module.training


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
