"""Compiling all kernels of a call at the same time, before the first of them is launched.

A backward pass of linear attention is ten kernels of two to six seconds of compiling each. One after the other, as each
is reached, they would take most of a minute; the compiler leaves Python free to run, so threads compile them together.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
import triton

from .triton_device import INTERPRETED

_ONLY_COMPILE: ContextVar[bool] = ContextVar("only_compile", default=False)
WORKERS = 16


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``; inside :func:`compile_together` what takes the same arguments and only compiles."""
    return functools.partial(kernel.warmup, grid=grid) if _ONLY_COMPILE.get() else kernel[grid]


def compile_together(*calls: Callable[[], Any]) -> None:
    """Compiles what the calls would launch through :func:`launcher`, whose results mean nothing.

    Kernels that are compiled already cost a look into Triton's cache. Nothing happens under the interpreter, nor while
    a CUDA graph is recorded, which the calls' tensor operations would become a part of.
    """
    if INTERPRETED or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    workers = min(WORKERS, os.cpu_count() or 1)
    token = _ONLY_COMPILE.set(True)
    try:
        with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
            for call in calls:
                call()
    finally:
        _ONLY_COMPILE.reset(token)
