"""Asking for kernels of the native library by name."""

from __future__ import annotations

import pytest

from lincompile.lowering.native import library
from lincompile.passes.errors import LincompileError

KERNELS = ("avx512vnni", "avx2", "portable")
BODY = "body"  # no library: the function bodies in the file


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes sessions of this test run these kernels; skips it, with the reason, where they can't run."""
    monkeypatch.setenv("LINCOMPILE_NATIVE", "0" if name == BODY else name)
    if name != BODY:
        try:
            library.library_path()
        except LincompileError as error:
            pytest.skip(str(error))
    return name
