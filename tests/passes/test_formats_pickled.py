"""State dicts and pickles: strict about keys, and nothing in the file runs unasked."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from refusals import Payload, refusal
from safetensors.torch import save_file
from torch import nn

from lincompile.passes.errors import ModelLoadError
from lincompile.passes.formats.load import check_finite, load_model


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_with_a_builder(here: Path, legacy: bool) -> None:
    model = zoo.build("nanogpt", 3)[0]
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
    model = zoo.build("nanogpt", 3)[0]
    torch.save({prefix + k: v for k, v in model.state_dict().items()}, here / "model.pt")
    loaded = load_model(here / "model.pt", model="builders:build")
    assert any("stripped" in note for note in loaded.notes)
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)


def test_checkpoint_with_the_weights_inside(here: Path) -> None:
    model = zoo.build("nanogpt", 3)[0]
    torch.save({"model": model.state_dict(), "iter": 7, "optimizer": {"lr": 0.1}}, here / "ckpt.pt")
    loaded = load_model(here / "ckpt.pt", model="builders:build")
    assert "the checkpoint's 'model'" in loaded.notes[0]
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)


def test_safetensors_with_a_builder_and_a_tied_head(here: Path) -> None:
    model = zoo.build("nanogpt", 3)[0]
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, here / "weights.bin")
    loaded = load_model(here / "weights.bin", model="builders:build")
    assert loaded.format == "safetensors"
    torch.testing.assert_close(loaded.module(**loaded.example), model(loaded.example["idx"]), rtol=0, atol=0)


def test_state_dict_without_a_builder_says_how_to_give_one(here: Path) -> None:
    torch.save(zoo.build("nanogpt", 3)[0].state_dict(), here / "model.pt")
    assert "--model module:function" in refusal(here / "model.pt")


def test_missing_unexpected_and_misshapen_tensors_are_listed(here: Path) -> None:
    torch.save(zoo.build("nanogpt", 3)[0].state_dict(), here / "model.pt")
    message = refusal(here / "model.pt", model="builders:deep")
    assert "12 missing (h.2.attn.c_attn.bias" in message
    assert "(12 in all)" in message
    message = refusal(here / "model.pt", model="builders:wide")
    assert "of another shape" in message
    assert "h.0.attn.c_attn.bias [96] instead of [192]" in message
    state = zoo.build("nanogpt", 3)[0].state_dict()
    state["h.9.extra"] = torch.ones(2)
    torch.save(state, here / "more.pt")
    assert "1 unexpected (h.9.extra)" in refusal(here / "more.pt", model="builders:build")


def test_not_a_state_dict(here: Path) -> None:
    torch.save([1, 2, 3], here / "list.pt")
    assert "holds a list" in refusal(here / "list.pt", model="builders:build")
    torch.save({"epoch": 3}, here / "dict.pt")
    assert "with the keys epoch" in refusal(here / "dict.pt", model="builders:build")


def test_nan_in_the_weights_is_named(here: Path) -> None:
    state = zoo.build("nanogpt", 3)[0].state_dict()
    state["h.1.mlp.0.weight"][3, 4] = float("nan")
    torch.save(state, here / "model.pt")
    message = refusal(here / "model.pt", model="builders:build")
    assert "1 NaN" in message
    assert "h.1.mlp.0.weight" in message


def test_infinity_is_refused_in_weights_but_not_in_masks() -> None:
    check_finite(zoo.build("nanogpt-additive-buffer")[0])  # holds a mask of -inf
    model = zoo.build("nanogpt", 3)[0]
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
    model = zoo.build("nanogpt", 3)[0]
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
    torch.save(zoo.build("nanogpt", 3)[0], tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        for name in old.namelist():
            new.writestr(
                name, old.read(name).replace(b"czoo\n", b"czox\n") if name.endswith("data.pkl") else old.read(name)
            )
    assert "can't be found here" in refusal(tmp_path / "new.pt", trust=True)
