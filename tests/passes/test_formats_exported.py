"""Exported programs and TorchScript."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from refusals import Payload, refusal
from torch import nn

from lincompile.passes.capture import from_exported
from lincompile.passes.formats.load import load_model


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def dynamic_program(model: nn.Module) -> torch.export.ExportedProgram:
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return torch.export.export(model, (zoo.tokens(),), dynamic_shapes=(dims,), strict=False)


def test_exported_program_renamed_pt(tmp_path: Path) -> None:
    model = zoo.build("nanogpt", 3)[0]
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
    torch.export.save(dynamic_program(zoo.build("nanogpt", 3)[0]), tmp_path / "p.pt2")
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
    torch.export.save(dynamic_program(zoo.build("nanogpt", 3)[0]), tmp_path / "p.pt2")
    path = rewritten(tmp_path / "p.pt2", tmp_path / "q.pt2", {"models/model.json": b"{}"})
    assert "export it again" in refusal(path)
    assert "leave --model out" in refusal(tmp_path / "p.pt2", model="builders:build")


def test_torchscript_is_converted_and_stays_dynamic(tmp_path: Path) -> None:
    model = zoo.build("nanogpt", 3)[0]
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
