"""What the Triton kernels ask of the device they run on. Imported by the kernels' files only."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter runs kernels on CPU tensors. It multiplies bfloat16 by its bit patterns, so that kernels with
# matrix products run in float32 there.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Kernel arguments that no address depends on in a way that divisibility by 16 would help: a kernel compiled for one
# length serves every other.
COUNTS = ["T", "S", "H", "HKV", "HEADS", "CHUNKS", "SEGMENTS", "PER_SEGMENT", "PER_PROGRAM", "TILES", "N"]
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; under the interpreter a few, enough to exercise segments."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may ask for (without limit under the interpreter, 0 on other CPUs)."""
    if device.type != "cuda":
        return 1 << 30 if INTERPRETED else 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


@functools.cache
def chained(device: torch.device, early: bool = True) -> dict[str, bool]:
    """Options of kernels that may begin before the one in front of them ends (Hopper's programmatic dependent launch).

    Such a kernel has PDL as a constant, tells at its beginning that the next may come, and waits (``gdc_wait``) before
    it reads anything that another kernel wrote. What never changes, weights above all, it reads before that: in a step
    of one token waiting for those, and being launched, takes most of a kernel's time.

    Args:
        early: nothing of that was copied for this call: a copy is written by a kernel in front.
    """
    off = not early or device.type != "cuda" or INTERPRETED or torch.version.hip
    if off or torch.cuda.get_device_capability(device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes that kernels load."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
