"""What the tests of Triton kernels share: the interpreter in a process of its own, and NaN in fresh memory."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed")
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="run by test_under_the_interpreter"
)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every uninitialised float tensor made inside starts as NaN: what no kernel wrote shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def spoil(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def make(*args: Any, **kwargs: Any) -> Tensor:
        return spoil(empty(*args, **kwargs))

    def make_new(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return spoil(new_empty(self, *args, **kwargs))

    torch.empty, Tensor.new_empty = make, make_new  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.empty, Tensor.new_empty = empty, new_empty  # type: ignore[method-assign]


def patch_once() -> None:
    """Spares the interpreter a third of its time.

    It patches Triton's language, member by member, for every function that a kernel calls, and finds them patched.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or not hasattr(interpreter, "_LangPatchScope"):
        return  # another version's inside

    def patch_unpatched(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value in (language, language.core)]
        members = [language.tensor.__add__, *(module.load for module in modules)]
        if modules and not any(language.core.is_builtin(member) for member in members):
            return interpreter._LangPatchScope()  # with nothing to undo
        return patch(fn)

    interpreter._patch_lang = patch_unpatched


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    patch_once()


def run_under_the_interpreter(file: str, passed: int) -> None:
    """Runs a test file again with Triton interpreted; ``passed`` of its cases must pass."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{passed} passed" in done.stdout
