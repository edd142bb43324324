"""Data-parallel training: DDP and FSDP2 around a program, a linearized module and an opened artefact.

Tests of one rank run here; two ranks, each with half of the batch, give the losses of one process with all of it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

import lincompile
from lincompile.passes.errors import LincompileError

WORKER = Path(__file__).with_name("wrapped.py")


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wrapped", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("form", ["program", "module"])
def test_one_rank_trains_as_without(worker: ModuleType, group: None, form: str) -> None:
    teacher = set(worker.build().state_dict())
    plain = worker.make(form)
    names = [name for name in plain.state_dict() if "lincompile_attention" not in name]
    assert teacher - set(names) == set(), "the teacher's parameters keep their names"
    wanted = worker.train(plain)
    assert wanted[-1] < wanted[0]
    for wrap in ("ddp", "fsdp2"):
        model = worker.make(form)
        assert worker.train(worker.wrapped(model, wrap, 1)) == pytest.approx(wanted, rel=1e-5), wrap


def test_compiled_as_one_graph_it_trains_alike(worker: ModuleType) -> None:
    """The nn.Module form and the program under torch.compile(fullgraph=True), forward and backward."""
    wanted = worker.train(worker.make("module"))
    for form in ("module", "program"):
        compiled = torch.compile(worker.make(form), backend="aot_eager", fullgraph=True)
        assert worker.train(compiled) == pytest.approx(wanted, rel=1e-5)


def test_a_call_that_compile_meets_first_is_refused(worker: ModuleType) -> None:
    import copy

    model = copy.deepcopy(worker.make("module"))
    with pytest.raises(Exception, match="make that call once before compiling"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.zeros(2, 9, dtype=torch.long))
    model(torch.zeros(2, 9, dtype=torch.long))
    torch.compile(model, backend="eager", fullgraph=True)(torch.zeros(2, 9, dtype=torch.long))


def test_sharding_inner_modules_of_a_linearized_module_is_refused(worker: ModuleType, group: None) -> None:
    """Their hooks wouldn't run, since the graph calls no inner module: only the whole can be sharded."""
    from torch.distributed.fsdp import fully_shard

    model = worker.make("module")
    fully_shard(model.blocks[0], mesh=worker.init_device_mesh("cpu", (1,)))
    with pytest.raises(LincompileError):
        model(torch.zeros(2, 9, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["program", "module", "artefact"])
def test_two_ranks_train_as_one(worker: ModuleType, tmp_path: Path, form: str) -> None:
    folder = ""
    if form == "artefact":
        pytest.importorskip("transformers")
        folder = str(lincompile.compile(worker.build(), attn="gla").save(tmp_path / "out"))
    plain = worker.train(worker.make(form, folder), vocabulary=40 if folder else 256)
    for wrap in ("ddp", "fsdp2"):
        arguments = [str(tmp_path / wrap), "RANK", "2", wrap, form, folder]
        ranks = [
            subprocess.Popen(
                [sys.executable, str(WORKER), *(str(rank) if item == "RANK" else item for item in arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=240) for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], outputs
        result = json.loads(outputs[0][0].splitlines()[-1])
        assert result["losses"] == pytest.approx(plain, rel=1e-4), wrap
        assert result["names"] and result["sharded"] == (wrap == "fsdp2")
