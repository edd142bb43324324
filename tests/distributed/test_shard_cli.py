"""``--shard sp``: what it refuses; and, slow, real torchrun processes (the documentation's commands run them too)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from lincompile.cli.main import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nano:build", "--shard", "sp"], 1, "--shard sp shares distillation's windows over ranks: add --distil FILE"),
        (
            ["nano:build", "--shard", "sp", "--distil", "x.txt"],
            1,
            "start it with torchrun --nproc-per-node N -m lincomp",
        ),
        (["generate", "d", "--prompt-ids", "1", "--shard", "sp"], 1, "start it with torchrun"),
        (["generate", "d", "--prompt-ids", "1", "--shard", "sp", "--runtime", "onnx"], 2, "goes with --runtime torch"),
        (["eval", "m", "--text", "ids.npy", "--shard", "sp", "--runtime", "onnx"], 2, "goes with --runtime torch"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_timeout_that_is_no_number(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(0, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LINCOMPILE_SHARD_TIMEOUT", "soon")
    assert run(["generate", "d", "--prompt-ids", "1", "--shard", "sp"]) == 1
    assert "LINCOMPILE_SHARD_TIMEOUT=soon: write a number of seconds" in capsys.readouterr().err


def environment(rank: int, world: int, port: int = 29500) -> dict[str, str]:
    """What torchrun tells a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_no_thread_of_the_group_outlives_it() -> None:
    """Alive when the interpreter ends, they abort the process now and then (`terminate called …`)."""
    script = """
import pathlib, torch
from lincompile.lowering.sharded import joined
def threads():
    return sum("gloo" in (task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir())
with joined():
    import torch._dynamo
    print(threads() > 0)
print(threads())
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = environment(0, 1, free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | place, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True", "0"], done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "examples" / "nano.py", tmp_path)
    text = (ROOT / "cli" / "data" / "demo-heldout.txt").read_bytes()[:20_000]
    numpy.save(tmp_path / "ids.npy", numpy.frombuffer(text, dtype=numpy.uint8).astype("int64"))
    return tmp_path


def lincompile(folder: Path, *arguments: str, ranks: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    shard = ["--shard", "sp"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "lincompile", *arguments, *shard]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_give_what_one_process_gives(folder: Path) -> None:
    """Distillation, perplexity of an artefact and of a model, generation, saved states."""
    training = [
        "--distil",
        "ids.npy",
        "--tokens",
        "4K",
        "--length",
        "128",
        "--train",
        "full",
        "--window",
        "8",
        "--keep-softmax",
        "1",
        "--json",
    ]
    one = json.loads(lincompile(folder, "nano:build", *training, "-o", "one"))["distillation"]
    two = json.loads(lincompile(folder, "nano:build", *training, "-o", "two", ranks=2))["distillation"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["logits"]["losses"] == pytest.approx(one["logits"]["losses"], rel=1e-3)
    for model in ("two", "nano:build"):
        measure = ["eval", model, "--text", "ids.npy", "--context", "99", "--tokens", "300", "--json"]
        assert json.loads(lincompile(folder, *measure, ranks=3)) == pytest.approx(
            json.loads(lincompile(folder, *measure)), rel=1e-5
        )
    prompt = ["generate", "two", "--prompt-ids", ",".join(map(str, range(60, 160))), "--max-new-tokens", "6"]
    wanted = lincompile(folder, *prompt)
    assert lincompile(folder, *prompt, "--save-state", "prompt.state", ranks=3) == wanted
    later = lincompile(folder, "generate", "two", "--load-state", "prompt.state", "--max-new-tokens", "6")
    assert wanted.strip().endswith(later.strip())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_leaves_one_line_and_no_artefact(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lincompile", "nano:build", "--shard", "sp", "--distil", "ids.npy", "-o", "out"]
    command += ["--tokens", "50M", "--length", "64", "--checkpoint", "run.pt"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LINCOMPILE_SHARD_TIMEOUT": "30"}
    ranks = [
        subprocess.Popen(
            command, cwd=folder, env=settings | environment(rank, 2, port), stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 200
    while not (folder / "run.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    ranks[1].send_signal(signal.SIGKILL)
    _, error = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    assert "rank 0 lost the others: one of them ended, or didn't answer within 30 s" in error.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "ids.npy",
        "nano.py",
        "run.pt",
    ]
