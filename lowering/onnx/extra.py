"""The optional packages of the ONNX lowering, asked for only when it is used."""

from __future__ import annotations

import importlib

from ...passes.errors import LincompileError


def require(*packages: str) -> None:
    """Import ``packages`` or say in one line which is missing and how to get it.

    Raises:
        LincompileError: a package isn't installed.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != package:
                raise  # the package is there, something it needs is broken: its own message says more
            raise LincompileError(
                f"the ONNX lowering needs the package '{package}', which is not installed: pip install lincompile[onnx]"
            ) from None
