"""Files are whole or not at all: a disk that is full ends in one line, and leaves what was there before."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from safetensors.torch import save_file

from lincompile.passes.errors import LincompileError
from lincompile.passes.quantization.plan import save_plan
from lincompile.passes.quantization.schemes import SCHEMES
from lincompile.passes.quantization.sensitivity import Scores
from lincompile.passes.writing import beside, unwritable

TENSORS = {"a": torch.zeros(50_000)}


def by_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(TENSORS, file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("a" * 50_000),
    "safetensors": lambda path: save_file(TENSORS, path),
    "torch, by name": lambda path: torch.save(TENSORS, path),
    "torch": by_torch,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(writer: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_text("the one before")
    with full_disk(), pytest.raises(LincompileError) as caught, beside(file, "the adapter") as new:
        WRITERS[writer](new)
    message = str(caught.value)
    assert message.startswith(f"the adapter {file} can't be written (") and "\n" not in message
    assert message.endswith("): make room there, or choose another place")
    assert file.read_text() == "the one before" and os.listdir(tmp_path) == [file.name]
    with beside(file, "the adapter") as new:
        WRITERS[writer](new)
    assert file.stat().st_size > 50_000 - 1 and os.listdir(tmp_path) == [file.name]


def test_another_place_is_all_that_helps_elsewhere(tmp_path: Path) -> None:
    for file in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(LincompileError, match=r"\): choose another place$"), beside(file, "the plan") as new:
            new.write_text("x")
    assert not os.listdir(tmp_path)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (KeyError("x"), LincompileError("no adapter"), RuntimeError("no kernel"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, beside(tmp_path / "file", "the plan") as new:
            new.write_text("half")
            raise error
        assert caught.value is error
        assert not os.listdir(tmp_path)
    assert unwritable(RuntimeError("no kernel")) is None
    assert unwritable(OSError(errno.ENOSPC, "")) == (
        "No space left on device", "make room there, or choose another place",
    )  # fmt: skip
    assert unwritable(OSError("of no number")) == ("of no number", "choose another place")


def test_links_stay_and_devices_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    with beside(link, "the plan") as new:
        new.write_text("x")
    assert link.is_symlink() and (tmp_path / "there" / "file").read_text() == "x"
    device = tmp_path / "device"
    device.symlink_to(os.devnull)
    with beside(device, "the plan") as new:
        new.write_text("x")
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(os.name != "posix", reason="no pipes here")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_pipe_stays_one_whoever_writes(writer: str, tmp_path: Path) -> None:
    """Safetensors renames a file of its own to the name it is given: run by root, /dev/null was one from then on."""
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with beside(pipe, "the adapter") as new:
        WRITERS[writer](new)
    assert pipe.is_fifo() and os.listdir(tmp_path) == [pipe.name]
    reader.join(60)
    assert len(read[0]) > 50_000 - 1


def test_a_file_protected_from_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("the one before")
    file.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))  # as for others than root
    with (
        pytest.raises(LincompileError, match=r"can't be written \(Permission denied\)"),
        beside(file, "the plan") as new,
    ):
        new.write_text("x")
    assert file.read_text() == "the one before" and os.listdir(tmp_path) == [file.name]


@pytest.mark.skipif(os.name != "posix", reason="no permissions here")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_keeps_its_permissions_and_a_new_one_gets_the_users(writer: str, tmp_path: Path) -> None:
    """What was made private, or is by the user's umask, isn't shown to everyone."""
    before = os.umask(0o027)
    try:
        file = tmp_path / "file"
        for mode in (0o640, 0o600):
            with beside(file, "the plan") as new:
                WRITERS[writer](new)
            assert stat.S_IMODE(file.stat().st_mode) == mode
            file.chmod(0o600)
    finally:
        os.umask(before)


def test_scores_and_plans_are_whole_or_not_at_all(tmp_path: Path) -> None:
    scheme = next(iter(SCHEMES))
    plan, scores = tmp_path / "plan.json", tmp_path / "scores.json"
    made = Scores("kl", "a model")
    made.save(scores)
    before = scores.read_text()
    for index in range(1000):
        made.add(f"layer {index}", scheme, 1.0)
    with full_disk(), pytest.raises(LincompileError, match=r"the scores .*scores.json can't be written \(File too"):
        made.save(scores)
    assert scores.read_text() == before
    with full_disk(), pytest.raises(LincompileError, match=r"the plan .*plan.json can't be written \(File too large"):
        save_plan(plan, {f"layer {index}": SCHEMES[scheme] for index in range(1000)})
    assert os.listdir(tmp_path) == [scores.name]
