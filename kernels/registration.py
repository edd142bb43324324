"""What every op's registration shares: dispatch to Triton, and gradients that may be absent."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]
P = ParamSpec("P")
R = TypeVar("R")

# What nobody has checked on a GPU yet (kernels that only compile, say) is off there unless this is set.
UNMEASURED = os.environ.get("LINCOMPILE_UNMEASURED", "0") == "1"


@functools.cache
def triton_module(folder: str, file: str = "triton") -> ModuleType | None:
    """The Triton kernels of ``kernels/<folder>``, or None where Triton or that file doesn't exist."""
    name = f"{__package__}.{folder}.{file}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def backend(folder: str, x: Tensor, file: str = "triton") -> ModuleType | None:
    """The Triton kernels for CUDA tensors; None means: run the reference.

    Triton launches on the current device, in no order with another one's kernels: tensors elsewhere are the
    reference's.
    """
    if not x.is_cuda:
        return None
    if x.device.index != (current := torch.cuda.current_device()):
        _elsewhere(x.device, current)
        return None
    return triton_module(folder, file)


@functools.cache
def _elsewhere(device: torch.device, current: int) -> None:
    warnings.warn(
        f"lincompile: tensors lie on {device} while cuda:{current} is the current device, where Triton launches, so "
        f"slower torch ops are used; call torch.cuda.set_device({device.index}) first",
        stacklevel=4,
    )


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """An op computes in its inputs' types: autocast decides on those, not on the sums inside."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def present(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """A schema can't return an optional tensor: an absent gradient travels as an empty one."""
    return tuple(like.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def gradient_fake(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Fake results of a backward op whose differentiable inputs are ``inputs``."""
    anchor = next(x for x in inputs if x is not None)
    return tuple(anchor.new_empty(0) if x is None else torch.empty_like(x).contiguous() for x in inputs)


def selected(grads: tuple[Tensor, ...], needed: tuple[bool, ...]) -> Grads:
    """Gradients for the tensor inputs, padded with None for the options after them."""
    return tuple(g if i < len(grads) and needed[i] else None for i, g in enumerate(grads)) + (None,) * (
        len(needed) - len(grads)
    )
