"""Runs a GPU benchmark's control flow on a CPU, so that no GPU minute is lost to a slip; its figures mean nothing.

    python benchmarks/dry.py linear_attention.py --time --decode --peers "fla,sdpa flash"

"cuda" becomes "cpu", CUDA's events, streams and graphs become stand-ins, and the script's SHAPES, LENGTHS and other
sizes become those that it gives as ``DRY``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return max((other.at - self.at) * 1e3, 1e-6)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


class Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


@contextlib.contextmanager
def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class OnCpu(TorchFunctionMode):
    """Every "cuda" among a torch function's arguments means the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: "cpu" if value == "cuda" else value for key, value in (kwargs or {}).items()}
        args = tuple("cpu" if isinstance(value, str) and value == "cuda" else value for value in args)
        if getattr(func, "__name__", "") == "cuda":
            return args[0]
        return func(*args, **kwargs)


def pretend() -> None:
    """Stand-ins for what the benchmarks use of torch.cuda."""
    torch.Generator, torch.autocast = Generator, Autocast  # type: ignore[misc]
    torch.nn.Module.cuda = lambda self: self  # type: ignore[assignment, method-assign, return-value]
    stands: dict[str, Any] = {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": nothing, "stream": nothing,
        "current_stream": Stream, "synchronize": lambda: None, "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 0, "memory_allocated": lambda: 0,
        "get_device_name": lambda: "dry run",
    }  # fmt: skip
    for name, stand in stands.items():
        setattr(torch.cuda, name, stand)


def main() -> int:
    script, sys.argv[:] = sys.argv[1], sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    pretend()
    module = importlib.import_module(Path(script).stem)
    for name, value in {**getattr(module, "DRY", {}), "bandwidth": lambda: 1e6}.items():
        if hasattr(module, name):
            setattr(module, name, value)
    with OnCpu():
        return int(module.main() or 0)


if __name__ == "__main__":
    sys.exit(main())
