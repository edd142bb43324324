"""Timing on a GPU, the same for every benchmark and every peer.

A call's time is that of a CUDA graph of it: kernels and the gaps between them, without the Python that launches them,
which for small problems is most of what a clock around the call would show. What can't be recorded is timed as it is,
and its row says so. ``eager_ms`` is the call from Python, the device waited for after each.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


@contextlib.contextmanager
def alone(file: Path | None) -> Iterator[None]:
    """Waits until no other process holds this file: processes that build side by side time one after the other."""
    if file is None:
        yield
        return
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def milliseconds(function: Call, budget: float = 1.0) -> float:
    """Median of as many calls as fit the budget in seconds, 5 to 30, after warm-up."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    repeat = int(min(30, max(5, budget / max(time.perf_counter() - started, 1e-5))))
    times = []
    for _ in range(repeat):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def recorded(function: Call, calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls, after three that warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def graph_milliseconds(function: Call, budget: float = 1.0, calls: int = 1) -> float:
    """One call's time in a recorded graph of ``calls``."""
    graph = recorded(function, calls)
    took = milliseconds(graph.replay, budget) / calls
    graph.reset()
    return took


def both(function: Call, leaves: list[Tensor], budget: float) -> dict[str, Any]:
    """Forward and, with leaves, forward + backward: first call (compiling and tuning) in s, ms, GiB beyond the inputs.

    The first of a call's outputs is what gradients start from.
    """

    def outputs() -> Tensor:
        result = function()
        return result[0] if isinstance(result, tuple) else result

    started = time.perf_counter()
    with torch.set_grad_enabled(bool(leaves)):
        out = outputs()
    grad = torch.randn_like(out)
    if leaves:
        torch.autograd.grad(out, leaves, grad)
    torch.cuda.synchronize()
    row: dict[str, Any] = {"first_call_s": round(time.perf_counter() - started, 2)}
    del out

    def train() -> None:
        torch.autograd.grad(outputs(), leaves, grad)

    eager, unrecorded = [], []
    for key, call in (("forward_ms", function), ("forward_backward_ms", train))[: 2 if leaves else 1]:
        with torch.set_grad_enabled(call is train):
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            eager.append(round(milliseconds(call, budget / 2), 4))
            row["peak_gib"] = round((torch.cuda.max_memory_allocated() - base) / 2**30, 3)
            try:
                row[key] = round(graph_milliseconds(call, budget), 4)
            except RuntimeError as error:
                row[key] = eager[-1]
                unrecorded.append(f"{key}: {str(error)[:120]}")
    row["eager_ms"] = eager
    return row | ({"not recorded": unrecorded} if unrecorded else {})


def bandwidth() -> float:
    """Bytes per ms that a copy moves, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def guarded(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the function gives, or its error: one part that fails doesn't end a run."""
    try:
        return function()
    except Exception as error:
        torch.cuda.empty_cache()
        return {
            "ok": False,
            "error": f"{type(error).__name__}: {error}"[:500],
            "traceback": traceback.format_exc()[-4000:],
        }
