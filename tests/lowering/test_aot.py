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

from lincompile.lowering import package
from lincompile.lowering.aot import AotSession, export_aot
from lincompile.lowering.generate import generate
from lincompile.passes.errors import ArtefactError

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


def test_missing_and_damaged_packages(artefact: package.Artefact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artefact.directory, copy)
    (copy / "aot" / "model.pt2").write_bytes(b"PK\x03\x04 not a package")
    with pytest.raises(ArtefactError, match="can't load the package"):
        AotSession(package.open_artefact(copy))
    shutil.rmtree(copy / "aot")
    with pytest.raises(ArtefactError, match="--target aot"):
        AotSession(package.open_artefact(copy))
