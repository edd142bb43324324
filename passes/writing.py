"""Files that are there whole or not at all, and one line about those that can't be written."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LincompileError

REMAINS_AFTER = 600.0  # seconds after which a file that was being written counts as left behind
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def beside(path: Path, what: str) -> Iterator[Path]:
    """A new file beside ``path`` to write to. It takes that place when the block ends well and is gone otherwise.

    Args:
        what: what is written, for the message: ``"the state file"``.

    Raises:
        LincompileError: it can't be written.
    """
    temporary: str | None = None
    target = Path(os.path.realpath(path))  # a link stays one
    with one_line(f"{what} {path}"):
        try:
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if target.exists() and not os.access(target, os.W_OK):  # renaming wouldn't ask
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if target.exists() and not target.is_file():
                with _through(target) as file:
                    yield file
                return
            _remove_remains(target)
            temporary, mode = _new(target)
            yield Path(temporary)
            os.chmod(temporary, mode)  # writers may have made a file of their own there
            os.replace(temporary, target)
        finally:
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)


def check_writable(path: Path, what: str) -> None:
    """Refuses a file that ``beside`` couldn't write, before the work that it would hold.

    Raises:
        LincompileError: as ``beside``; what is there stays as it is.
    """
    with contextlib.suppress(_Dropped), beside(path, what):
        raise _Dropped


class _Dropped(Exception):
    """Ends a ``beside`` that isn't to take its place."""


@contextmanager
def one_line(what: str, kind: type[LincompileError] = LincompileError) -> Iterator[None]:
    """Errors inside that are about writing become a ``kind`` in one line: why, and what to do. Others stay as they are.

    Args:
        what: what is written, with its path.
    """
    try:
        yield
    except Exception as error:
        if (why := unwritable(error)) is None:
            raise
        raise kind(f"{what} can't be written ({why[0]}): {why[1]}") from error


@contextmanager
def _through(device: Path) -> Iterator[Path]:
    """A file elsewhere whose bytes are sent to a device or pipe: safetensors would put a file in its place."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "file")
        file.touch()
        yield file
        with file.open("rb") as made, device.open("wb") as sink:
            shutil.copyfileobj(made, sink)


def _new(target: Path) -> tuple[str, int]:
    """An empty file beside ``target``, and the permissions that are to be its: what is there keeps its own."""
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    new.touch(exist_ok=False)  # with what the user's umask leaves, which tempfile's haven't
    return str(new), stat.S_IMODE((target if target.exists() else new).stat().st_mode)


def unwritable(error: BaseException) -> tuple[str, str] | None:
    """Why a file couldn't be written, and what to do; None for an error that is about something else."""
    number = _number(error)
    if number is None:
        return None
    why = os.strerror(number) if number else str(error) or type(error).__name__
    return why, "make room there, or choose another place" if number in _FULL else "choose another place"


def _number(error: BaseException) -> int | None:
    """The system's number of an error in writing, 0 where it says none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError":  # without importing safetensors: it says only this of the system
        found = re.search(r"os error (\d+)|code: (\d+)", str(error))
        return int(found[1] or found[2]) if found else None
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
        # torch's archives: writing to a file of Python's, that file's error is what they came upon.
        return getattr(error.__context__, "errno", None) or errno.ENOSPC
    return None


def _remove_remains(path: Path) -> None:
    """Removes what writers of this file that were killed have left; one at work writes all the time."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > REMAINS_AFTER:
                partial.unlink()
