"""What a layer costs in time under each scheme, measured on the device the program is on.

One token per call, as in decoding. On a GPU, calls are timed on the device over copies of the weights that don't fit
its cache together; on a CPU, by the clock. Only shapes decide, so each is measured once, with random weights.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import ops as _ops  # noqa: F401  registers torch.ops.lincompile
from ...kernels.int6_linear.codes import quantize_weight
from ...kernels.int6_linear.pack import pack
from ..errors import LincompileError
from .linear_layers import LinearLayer
from .schemes import SCHEMES, Scheme

Latencies = dict[str, dict[str, float]]
_RUNS = 9
_PAST_CACHE = 256 << 20


def shape_of(layer: LinearLayer) -> str:
    """The key of a layer in a table of latencies."""
    return f"{layer.out_features}x{layer.in_features}"


def measure_latencies(
    layers: Sequence[LinearLayer], schemes: Sequence[str], group_size: int, device: torch.device, dtype: torch.dtype
) -> Latencies:
    """Microseconds of one call for one token, by shape ``NxK`` and scheme; ``dtype`` is that of the float layer."""
    table: Latencies = {}
    for layer in layers:
        if shape_of(layer) not in table:
            table[shape_of(layer)] = {
                name: _microseconds(layer.out_features, layer.in_features, SCHEMES[name], group_size, device, dtype)
                for name in schemes
            }
    return table


def load_latencies(path: str | os.PathLike[str]) -> Latencies:
    """Read ``{"NxK": {scheme: microseconds}}``.

    Raises:
        LincompileError: not such a file.
    """
    try:
        table = json.loads(Path(path).read_text())
        return {shape: {name: float(value) for name, value in row.items()} for shape, row in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LincompileError(f"latencies '{path}' can't be read ({error}): delete the file, or repair it") from error


@torch.no_grad()
def _microseconds(
    rows: int, width: int, scheme: Scheme, group_size: int, device: torch.device, dtype: torch.dtype
) -> float:
    weight = torch.randn(rows, width, device=device, dtype=dtype)
    x = torch.randn(1, width, device=device, dtype=dtype)
    buffers: tuple[Tensor, ...] = (weight,)
    if not scheme.is_float:
        codes, scale = quantize_weight(weight, group_size, bits=scheme.weight_bits)
        buffers = (codes, scale) if scheme.weight_bits == 8 else (*pack(codes, group_size), scale)
    size = sum(part.numel() * part.element_size() for part in buffers)
    copies = [tuple(part.clone() for part in buffers) for _ in range(_PAST_CACHE // size + 1 if x.is_cuda else 1)]
    operator = torch.ops.lincompile.int8_linear if scheme.weight_bits == 8 else torch.ops.lincompile.int6_linear

    def calls() -> None:
        for parts in copies:
            if scheme.is_float:
                torch.nn.functional.linear(x, parts[0])
            else:
                operator(x, *parts, None, group_size, scheme.activation)

    calls()
    times = [_device_seconds(calls) if x.is_cuda else _seconds(calls) for _ in range(_RUNS)]
    return 1e6 * statistics.median(times) / len(copies)


def _seconds(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _device_seconds(call: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
