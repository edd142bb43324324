"""``package.module:function``: the user's own code builds the model."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import ModelLoadError
from .loaded import LoadedModel, LoadOptions, one_line
from .plain import Example, load_module

_SPELLING = re.compile(r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*$")


def names_function(source: str) -> bool:
    """Whether a string reads ``package.module:function``."""
    return _SPELLING.match(source) is not None


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Let imports find the user's modules in the current folder, as ``python -m`` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def build_module(spec: str) -> tuple[nn.Module, Example | None]:
    """Import and call ``package.module:function``; it returns a module, or a module and an example.

    Raises:
        ModelLoadError: the spelling, the import, the call or what it returns is wrong.
    """
    if not names_function(spec):
        raise ModelLoadError(f"'{spec}': expected package.module:function, for example train:build_model")
    module_name, _, function_name = spec.partition(":")
    with current_folder_importable():
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name + ".").startswith(error.name + "."):
                raise ModelLoadError(
                    f"{spec}: no module named '{error.name}' in the current folder or among the installed packages"
                ) from error
            raise ModelLoadError(f"{spec}: importing '{module_name}' fails: {one_line(error)}") from error
        except Exception as error:  # whatever the user's module raises on import
            raise ModelLoadError(
                f"{spec}: importing '{module_name}' fails: {type(error).__name__}: {one_line(error)}"
            ) from error
        for part in function_name.split("."):
            if not hasattr(target, part):
                raise ModelLoadError(f"{spec}: '{module_name}' has no '{function_name}'; name a function defined there")
            target = getattr(target, part)
        if isinstance(target, nn.Module):
            result: Any = target
        elif callable(target):
            try:
                result = target()
            except Exception as error:  # whatever the user's function raises
                raise ModelLoadError(
                    f"{spec}: the function fails: {type(error).__name__}: {one_line(error)} "
                    "(it is called without arguments)"
                ) from error
        else:
            raise ModelLoadError(f"{spec}: '{function_name}' is a {type(target).__name__}, not a function")
    example: Any = None
    if isinstance(result, tuple) and len(result) == 2:
        result, example = result
    if not isinstance(result, nn.Module):
        raise ModelLoadError(
            f"{spec}: the function returns a {type(result).__name__}; return an nn.Module, or (module, example)"
        )
    if example is not None and not isinstance(example, Mapping | Tensor | list | tuple):
        raise ModelLoadError(
            f"{spec}: the example is a {type(example).__name__}; return a tensor, a tuple of tensors or a dict by name"
        )
    return result, example


def load_function(spec: str, options: LoadOptions, example: Example | None) -> LoadedModel:
    """Load the model that ``package.module:function`` builds; its weights are whatever the function gave it."""
    module, given = build_module(spec)
    example = given if example is None else example
    from .huggingface import is_pretrained, load_pretrained

    if is_pretrained(module):
        return load_pretrained(module, source=spec, source_format="function", options=options, example=example)
    return load_module(module, source=spec, source_format="function", options=options, example=example)
