"""``benchmarks/background.py``: what runs on when its shell has ended, and what comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "background.py"


def background(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_queues_run_side_by_side_and_a_failure_is_told(tmp_path: Path) -> None:
    folder, out = tmp_path / "work", tmp_path / "out"
    (folder / "rows").mkdir(parents=True)
    writes = f"echo $CUDA_VISIBLE_DEVICES > {folder}/rows/one.json; echo trained"
    started = background(
        "start", folder, "--gpu", 3, writes, "--gpu", 3, "exit 4", "--gpu", 3, "echo next", "--cpu", "a", "sleep 1"
    )
    assert started.returncode == 0, started.stderr
    done = background("wait", folder, "--seconds", 60, "--copy", out)
    assert done.returncode == 1, done.stdout
    assert "== gpu3: exits [0, 4, 0] of 3" in done.stdout and "== cpu-a: exits [0] of 1" in done.stdout
    assert "trained" in done.stdout and "next" in done.stdout
    assert (out / "rows_one.json").read_text().strip() == "3" and (out / "gpu3.log").exists()
    again = background("start", folder, "--gpu", 3, "true")
    assert again.returncode == 2 and "has a queue gpu3 already" in again.stderr


def test_waiting_ends_in_time_and_at_once_where_there_is_nothing(tmp_path: Path) -> None:
    assert background("wait", tmp_path / "none", "--seconds", 100).returncode == 2
    assert background("start", tmp_path / "work", "--cpu", "long", "sleep 3").returncode == 0
    waited = background("wait", tmp_path / "work", "--seconds", 0.1)
    assert waited.returncode == 3 and "exits [] of 1" in waited.stdout
    assert background("wait", tmp_path / "work", "--seconds", 60).returncode == 0
    assert json.loads((tmp_path / "work" / "cpu-long.queue").read_text())["ended"] == [0]
    assert background("start", tmp_path / "other").returncode == 2


def test_a_worker_that_was_killed_isnt_waited_for(tmp_path: Path) -> None:
    assert background("start", tmp_path, "--cpu", "long", "sleep 30").returncode == 0
    os.killpg(int((tmp_path / "cpu-long.pid").read_text()), signal.SIGKILL)
    (tmp_path / "large.json").write_bytes(bytes((16 << 20) + 1))
    waited = background("wait", tmp_path, "--seconds", 100, "--copy", tmp_path / "out")
    assert waited.returncode == 1 and "the process of cpu-long has ended before its commands" in waited.stdout
    assert "not copied, 16,777,217 bytes" in waited.stdout and not (tmp_path / "out" / "large.json").exists()
