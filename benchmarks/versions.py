"""What a result file says about where it was measured."""

from __future__ import annotations

import importlib
import platform
import subprocess

import torch

PACKAGES = ("torch", "triton", "transformers", "fla")


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
