"""The artefact folder: bit for bit, atomic, self-checking, and readable without transformers."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from full_disk import full_disk
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import lincompile
from lincompile.lowering import package
from lincompile.lowering.artefact import files as artefact_files
from lincompile.lowering.artefact.graph_file import move_constants, read_graph, weights_of
from lincompile.lowering.generate import Session, generate
from lincompile.passes.errors import ArtefactError, LincompileError
from lincompile.passes.graph import is_symbolic

PROMPT = [1, 2, 3, 4, 5, 6, 7]


def write(toy: SimpleNamespace, directory: Path, **options: Any) -> Path:
    manifest = {"source": {"name": "toy"}, "sites": toy.sites, "metrics": {"bad": float("nan"), "good": 1.5}, "seed": 0}
    return package.save(toy.step, directory, manifest=manifest, eos_ids=[39], **options)


@pytest.fixture(scope="module")
def folder(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(toy, tmp_path_factory.mktemp("artefact") / "out")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the artefact, to be changed or replaced, alone in its folder."""
    return Path(shutil.copytree(folder, tmp_path / "out"))


def test_reopens_bit_for_bit(toy: SimpleNamespace, folder: Path) -> None:
    before = Session(toy.step)
    artefact = package.open_artefact(folder)
    for name, tensor in weights_of(toy.graph_module).items():
        assert torch.equal(weights_of(artefact.step.graph_module)[name], tensor), name
    a, b = generate(before, [PROMPT, [3]], 10), generate(artefact.session, [PROMPT, [3]], 10)
    assert a.tokens == b.tokens
    assert torch.equal(a.state.logits, b.state.logits)
    assert artefact.states == list(toy.states)
    assert artefact.step.windows == toy.step.windows
    assert artefact.eos_ids == [39]
    assert artefact.generate(PROMPT, 10, eos_ids=[]) == PROMPT + a.tokens[0]


def test_weights_are_stored_once_and_only_in_safetensors(toy: SimpleNamespace, folder: Path) -> None:
    manifest = json.loads((folder / "lincompile.json").read_text())
    stored = load_file(folder / "model.safetensors")
    assert manifest["tied"] == {"head.weight": "embedding.weight"}
    assert "head.weight" not in stored
    unique = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in weights_of(toy.graph_module).values()
    }
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == sum(unique.values())
    embedding = stored["embedding.weight"].numpy().tobytes()
    assert embedding not in (folder / "program.pt2").read_bytes()


def test_a_loaded_program_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    first = package.open_artefact(folder)
    package.save(first.step, tmp_path / "again", manifest={"sites": first.manifest["sites"]})
    second = package.open_artefact(tmp_path / "again")
    assert second.generate(PROMPT, 6) == first.generate(PROMPT, 6)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_model_that_counts_its_positions_runs_where_its_weights_are(tmp_path: Path) -> None:
    """Its ``arange`` was traced on a CPU; the meta device stands for a GPU here."""
    module, example = zoo.build("nanogpt")
    folder = lincompile.compile(module, example=example, attn="softmax").save(tmp_path / "out")
    artefact = package.open_artefact(folder)
    weights = {name: tensor.to("meta") for name, tensor in weights_of(artefact.step.graph_module).items()}
    graph = read_graph(folder / "program.pt2", weights, set(artefact.manifest["parameter_names"])).graph
    created = [node for node in graph.nodes if "arange" in str(node.target)]
    assert created and all(node.kwargs["device"].type == "meta" for node in created)
    assert "device(type='cpu')" not in str([(node.args, node.kwargs) for node in graph.nodes])
    assert len(artefact.generate([1, 2, 3], 4)) == 7


def test_runs_in_a_fresh_process_without_transformers(folder: Path) -> None:
    script = f"""
import sys
for name in ("transformers", "onnx", "onnxruntime", "tokenizers"):
    sys.modules[name] = None  # import raises ImportError
from lincompile.lowering.package import open_artefact
print(open_artefact({str(folder)!r}).generate({PROMPT}, 6))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == package.open_artefact(folder).generate(PROMPT, 6)


def test_the_exported_graph_runs_with_torch_alone(toy: SimpleNamespace, folder: Path) -> None:
    module = torch.export.load(folder / "program.pt2").module(check_guards=False)
    weights = load_file(folder / "model.safetensors")
    weights["head.weight"] = weights["embedding.weight"]
    session = Session(toy.step)
    tokens, mask = torch.tensor([PROMPT]), torch.ones(1, len(PROMPT), dtype=torch.bool)
    positions = torch.arange(len(PROMPT))[None]
    states = session.initial_states(1)
    logits = module({name: weights[name] for name in sorted(weights)}, (tokens, positions, mask, *states))[0]
    torch.testing.assert_close(logits, session.step(tokens, positions, mask, states)[0])


def test_manifest_and_report(folder: Path) -> None:
    manifest = json.loads((folder / "lincompile.json").read_text())
    assert manifest["format_version"] == package.FORMAT_VERSION
    assert manifest["metrics"] == {"bad": "nan", "good": 1.5}, "JSON has no NaN"
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in manifest["versions"]["torch"]
    for name, record in manifest["files"].items():
        assert record == {"bytes": (folder / name).stat().st_size, "sha256": artefact_files.sha256(folder / name)}
    report = (folder / "report.html").read_text()
    assert "<script" not in report and "http" not in report, "the report is self-contained"
    for site in manifest["sites"]:
        assert site["path"] in report


def test_an_earlier_artefact_is_replaced(toy: SimpleNamespace, copied: Path, tmp_path: Path) -> None:
    (copied / "stale.txt").write_text("from before")
    write(toy, copied)
    assert not (copied / "stale.txt").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_files_of_another_runtime_are_recorded_and_forgotten(toy: SimpleNamespace, tmp_path: Path) -> None:
    out = write(toy, tmp_path / "out")
    before = json.loads((out / "lincompile.json").read_text())
    (out / "onnx" / "deep").mkdir(parents=True)
    (out / "onnx" / "deep" / "model").write_bytes(b"abc")
    artefact_files.record_files(out, out / "onnx")
    added = json.loads((out / "lincompile.json").read_text())["files"].keys() - before["files"].keys()
    assert added == {"onnx/deep/model"}
    package.open_artefact(out)
    (out / "onnx" / "deep" / "model").write_bytes(b"abd")
    with pytest.raises(ArtefactError, match="model doesn't match its hash"):
        package.open_artefact(out)
    artefact_files.forget_files(out, out / "onnx")
    assert json.loads((out / "lincompile.json").read_text()) == before
    for elsewhere in (tmp_path / "other", out):  # neither is a folder of the artefact's
        elsewhere.mkdir(exist_ok=True)
        artefact_files.forget_files(out, elsewhere)
    assert json.loads((out / "lincompile.json").read_text()) == before


def test_a_folder_that_holds_something_else_is_refused(toy: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"holds something else \('thesis.tex'\)"):
        write(toy, tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(toy: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ArtefactError, match="isn't a folder"):
        write(toy, tmp_path / "out")


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(ArtefactError, match="/proc is a mount point"):
        package.check_output(Path("/proc"))


@pytest.mark.parametrize("output", [".", "..", "new/..", "{}", "{}/.."])
def test_the_current_folder_and_those_above_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    inside = tmp_path / "above" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    with pytest.raises(ArtefactError, match="is the current folder or one that holds it"):
        package.check_output(Path(output.format(inside)))
    package.check_output(Path("out"))
    package.check_output(Path("../beside"))
    assert [item.name for item in tmp_path.rglob("*")] == ["above", "inside"]


def test_an_unwritable_place_is_one_clear_error(toy: SimpleNamespace) -> None:
    with pytest.raises(ArtefactError, match="can't be written"):
        write(toy, Path("/proc/lincompile/out"))


@pytest.mark.parametrize("full_at", ["model.safetensors", "program.pt2"])
def test_a_full_disk_is_one_line_and_keeps_the_earlier_artefact(
    toy: SimpleNamespace, copied: Path, tmp_path: Path, full_at: str
) -> None:
    """At the graph, too, where torch's own writer of files would end the process."""
    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    assert len(before["model.safetensors"]) < len(before["program.pt2"])
    with full_disk(len(before[full_at]) - 1), pytest.raises(ArtefactError) as caught:
        write(toy, copied)
    message = f"the output {copied} can't be written (File too large): make room there, or choose another place"
    assert str(caught.value) == message
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == before


@pytest.mark.parametrize("there", ["cpu", "cuda:0", "cuda:1"])
def test_what_is_known_of_a_graphs_values_moves_with_its_weights(toy: SimpleNamespace, there: str) -> None:
    """From any device to any other (another GPU, too), none of which has to be here; sizes stay symbolic."""
    graph = copy.deepcopy(toy.step.graph_module).graph
    shapes = [str(node.meta["val"]) for node in graph.nodes if "val" in node.meta]
    for device in ("cuda:1", there):
        move_constants(graph, torch.device(device))
    values = [value for node in graph.nodes for value in tree_leaves(node.meta.get("val"))]
    assert {value.device for value in values if isinstance(value, torch.Tensor)} == {torch.device(there)}
    graph.lint()
    move_constants(graph, torch.device("cpu"))
    assert [str(node.meta["val"]) for node in graph.nodes if "val" in node.meta] == shapes
    assert any(is_symbolic(size) for value in values if isinstance(value, torch.Tensor) for size in value.shape)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_save_leaves_nothing(toy: SimpleNamespace, tmp_path: Path, error: type[BaseException]) -> None:
    def interrupt(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise error

    with pytest.raises(ArtefactError if error is OSError else error):
        write(toy, tmp_path / "out", extra=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_earlier_artefact(toy: SimpleNamespace, copied: Path) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(toy, copied, extra=interrupt)
    assert len(package.open_artefact(copied).generate(PROMPT, 2)) == len(PROMPT) + 2


def tamper(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))


def change_manifest(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "lincompile.json").read_text())
    (folder / "lincompile.json").write_text(json.dumps({**manifest, **values}))


def change_state(folder: Path, **values: Any) -> None:
    first, *rest = json.loads((folder / "lincompile.json").read_text())["states"]
    change_manifest(folder, states=[first | values, *rest])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: tamper(f, "model.safetensors"), r"model.safetensors doesn't match its hash"),
        (lambda f: tamper(f, "program.pt2"), r"program.pt2 doesn't match its hash"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors doesn't match its hash"),
        (lambda f: (f / "program.pt2").unlink(), "program.pt2 is missing"),
        (lambda f: (f / "lincompile.json").write_text("{"), "can't be read"),
        (lambda f: (f / "lincompile.json").unlink(), "isn't a lincompile artefact"),
        (lambda f: (f / "lincompile.json").write_text("[]"), "no format_version"),
        (lambda f: change_manifest(f, format_version=99), "format version 99, .* upgrade lincompile"),
        (lambda f: (f / "lincompile.json").write_text('{"format_version": 1}'), "is damaged: 'files' is missing"),
        (lambda f: change_manifest(f, states=None), "is damaged: 'states' is missing"),
        (lambda f: change_manifest(f, states=[1]), "is damaged: 'states.0' is missing"),
        (lambda f: change_state(f, dtype="float99"), r"is damaged: 'states\.0\.dtype' is missing or isn't"),
        (lambda f: change_state(f, shape=None), r"is damaged: 'states\.0\.shape'"),
        (lambda f: change_manifest(f, files={}), "is damaged: 'files.model.safetensors' is missing"),
        (
            lambda f: change_manifest(f, files={"model.safetensors": {"bytes": 1}}),
            r"'files\.model\.safetensors\.sha256'",
        ),
        (lambda f: change_manifest(f, max_positions="64"), "is damaged: 'max_positions'"),
        (lambda f: change_manifest(f, windows={"blocks.0": 7}), "doesn't match its checksum: .* windows"),
        (lambda f: change_manifest(f, tied={"a": "b"}), "doesn't match its checksum"),
        (lambda f: change_state(f, role="conv"), "doesn't match its checksum"),
    ],
)
def test_damage_is_named(copied: Path, damage: Any, message: str) -> None:
    damage(copied)
    with pytest.raises(ArtefactError, match=message):
        package.open_artefact(copied)


def test_artefacts_of_before_the_checksum_and_what_is_added_later_open(copied: Path) -> None:
    package.add_metrics(copied, {"perplexity": 2.0})
    assert package.open_artefact(copied).manifest["metrics"]["perplexity"] == 2.0
    manifest = json.loads((copied / "lincompile.json").read_text())
    del manifest["checksum"]
    (copied / "lincompile.json").write_text(json.dumps(manifest))
    assert package.open_artefact(copied).generate([1, 2], 1)[:2] == [1, 2]


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="isn't a folder"):
        package.open_artefact(tmp_path / "nowhere")


def test_without_a_tokenizer_token_ids_still_work(folder: Path) -> None:
    artefact = package.open_artefact(folder)
    with pytest.raises(LincompileError, match=r"no tokenizer\.json: give token ids"):
        artefact.generate("text")
    assert artefact.generate([1, 2], 1)[:2] == [1, 2]
