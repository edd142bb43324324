"""AOTInductor packages: machine code that needs neither transformers nor the model's code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
import zoo

import lincompile
from lincompile.lowering import aot, package
from lincompile.lowering.aot import AotSession, export_aot, rounds_activations
from lincompile.lowering.generate import generate
from lincompile.lowering.triton import lower
from lincompile.passes.errors import ArtefactError, LincompileError

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"),
    pytest.mark.slow,  # each package is compiled by a C++ compiler
]

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 9], [30, 3, 11, 20]]
ELSEWHERE = """
import json, sys
for name in ("transformers", "onnx", "onnxruntime", "tokenizers"):
    sys.modules[name] = None
from lincompile.lowering.aot import AotSession
from lincompile.lowering.generate import generate
from lincompile.lowering.package import open_artefact
print(json.dumps(generate(AotSession(open_artefact(sys.argv[1])), json.loads(sys.argv[2]), 8).tokens))
"""


@pytest.fixture(scope="module")
def artefact(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> package.Artefact:
    folder = tmp_path_factory.mktemp("aot") / "out"
    opened = package.open_artefact(package.save(toy.step, folder, manifest={"sites": toy.sites}))
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # compiles in half the time
        report = export_aot(opened.step, folder / "aot")
    assert report.max_error < 1e-5 and report.bytes == Path(report.path).stat().st_size
    return opened


def test_batches_chunks_and_single_tokens_equal_torch(artefact: package.Artefact) -> None:
    session = AotSession(artefact)
    for prompts in (PROMPTS, PROMPTS[:1], [[7]]):
        assert generate(session, prompts, 8, chunk=4).tokens == generate(artefact.session, prompts, 8).tokens


def test_a_process_without_transformers_runs_it(artefact: package.Artefact, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(artefact.directory), json.dumps(PROMPTS)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == generate(artefact.session, PROMPTS, 8).tokens


def test_fused_stages_and_rounded_activations_are_packaged(tmp_path: Path) -> None:
    """What a GPU's package holds, compiled for the CPU: features and gates as one op each, and six-bit linears."""
    module, example = zoo.build("nanogpt-gqa-repeat")
    compiled = lincompile.compile(module, example=example, attn="lawcat", quant="w6a8")
    step, report = lower(compiled.step)
    assert (report.features, report.gates) == (4, 2) and rounds_activations(step.graph_module)
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        written = export_aot(step, tmp_path / "aot")
    assert written.max_error < 0.05


def test_a_package_that_differs_is_not_written(
    toy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, *states = toy.graph_module(*inputs)
        return (logits * 1.01, *states)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda exported, package_path: None)
    monkeypatch.setattr(aot, "_load", lambda path: wrong)
    with pytest.raises(LincompileError, match=r"logits differ from the program.s by 0\.01"):
        export_aot(toy.step, tmp_path / "aot")
    assert list((tmp_path / "aot").iterdir()) == []


def test_missing_and_damaged_packages(artefact: package.Artefact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artefact.directory, copy)
    (copy / "aot" / "model.pt2").write_bytes(b"PK\x03\x04 not a package")
    with pytest.raises(ArtefactError, match="can't load the package"):
        AotSession(package.open_artefact(copy))
    shutil.rmtree(copy / "aot")
    with pytest.raises(ArtefactError, match="--target aot"):
        AotSession(package.open_artefact(copy))
