"""Plans within a time per token: measured where nothing is given, read from a file where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lincompile.passes.capture import capture
from lincompile.passes.errors import LincompileError
from lincompile.passes.program import Program
from lincompile.passes.quantize import Quantize

TIMES = {"w6a6": 1.0, "w6a8": 2.0, "w8a8": 4.0, "float": 8.0}


@pytest.fixture
def program() -> Program:
    return capture(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).eval(), torch.randn(2, 5, 64))


def data(program: Program) -> list[dict[str, torch.Tensor]]:
    return [{program.inputs[0].name: torch.randn(2, 8, 64)} for _ in range(2)]


def times(path: Path, **change: float) -> str:
    path.write_text(json.dumps({"96x64": TIMES, "32x96": TIMES | change}))
    return str(path)


@pytest.mark.parametrize(("limit", "least"), [(2.0, 2.0), (5.0, 4.0), (100.0, 16.0)])
def test_the_plan_uses_the_time_it_may(program: Program, tmp_path: Path, limit: float, least: float) -> None:
    """Dearer schemes are more accurate here, so the best plan spends what it can: 1 + 4 or 2 + 2 of 5."""
    latencies = times(tmp_path / "times.json")
    pass_ = Quantize("auto", max_latency=limit, latencies=latencies, calibration=data(program))
    choice = pass_.run(program).report["choice"]
    assert least <= choice["cost"]["microseconds per token"] <= limit


def test_too_little_time_names_the_least(program: Program, tmp_path: Path) -> None:
    latencies = times(tmp_path / "times.json", w6a6=1.5)
    with pytest.raises(LincompileError, match=r"1 microseconds per token asked for, the smallest possible is 2\.5"):
        Quantize("auto", max_latency=1.0, latencies=latencies, calibration=data(program)).run(program)


def test_times_are_measured_saved_and_used_again(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    limit = Quantize("int6", max_latency=1e9, latencies=str(path), calibration=data(program))
    report = limit.run(program.clone()).report
    assert set(report["totals"]["schemes"]) <= {"w6a6", "w6a8"}
    table = json.loads(path.read_text())
    assert set(table) == {"96x64", "32x96"} and all(value > 0 for row in table.values() for value in row.values())
    path.write_text(json.dumps({"96x64": TIMES}))
    with pytest.raises(LincompileError, match="lack w6a6 for 32x96 \\('2'\\): delete the file"):
        limit.run(program)
    path.write_text("[1]")
    with pytest.raises(LincompileError, match="can't be read"):
        limit.run(program)
