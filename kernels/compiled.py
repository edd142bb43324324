"""Libraries that are compiled on the user's machine by the compiler found there, once, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_TIMEOUT = 120  # seconds


def build(
    name: str,
    language: str,
    sources: Mapping[str, str],
    compilers: Sequence[str],
    flags: Sequence[str],
    folder: Path | None = None,
) -> Path:
    """Compile ``sources`` into a shared library in ``folder`` (default: the user's cache) unless it is there.

    Args:
        name: what the file's name begins with; the rest is a hash of all that the result depends on.
        language: ``C`` or ``C++``, for the error where there is no compiler.
        sources: file names and texts; headers lie beside the sources, which are the names that don't end in ``.h``.
        compilers: commands to look for, the first found is used; empty ones are skipped.

    Returns:
        The library's path.

    Raises:
        FileNotFoundError: no compiler. PermissionError: the library there is another user's. OSError, RuntimeError
            (no home folder), subprocess.SubprocessError: the folder or the compiler failed.
    """
    wanted = [compiler for compiler in compilers if compiler]
    compiler = next((found for item in wanted if (found := shutil.which(item))), None)
    if compiler is None:
        raise FileNotFoundError(f"no {language} compiler ({', '.join(wanted)})")
    texts = [part for item in sources.items() for part in item]
    key = hashlib.sha256("\0".join([*texts, compiler, *flags, _processor()]).encode()).hexdigest()[:16]
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lincompile"
    target = folder / f"{name}_{key}.so"
    if target.exists():
        if hasattr(os, "getuid") and target.stat().st_uid != os.getuid():
            raise PermissionError(f"{target} belongs to another user")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for file, text in sources.items():
            (Path(work) / file).write_text(text)
        made = Path(work) / "made.so"
        units = [str(Path(work) / file) for file in sources if not file.endswith(".h")]
        command = [compiler, *flags, "-shared", "-fPIC", *units, "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT)
        made.replace(target)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by machines that differ in it."""
    return "\0".join([platform.machine(), platform.processor(), *sorted(processor_flags())])


def processor_flags() -> frozenset[str]:
    """Features of this processor as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())
