"""What a result file says about where it was measured."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "fla", "onnxruntime")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are there, the GPU if there is one, and the commit."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    return found


def machine(threads: int | None = None) -> dict[str, Any]:
    """The processor, its cores, what else it is busy with, and the threads that were used of it."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    found: dict[str, Any] = {
        "processor": names[0] if names else platform.machine(),
        "vectors": [name for name in ("avx2", "avx512f", "avx512_vnni") if name in flags],
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    return found if threads is None else found | {"threads": threads}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")  # Linux only
    return path.read_text().splitlines() if path.exists() else []
