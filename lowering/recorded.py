"""Steps of a session as CUDA graphs: a step that comes again is recorded once, and then launched as one.

A step of a small model is hundreds of kernels of a few microseconds, and Python can't launch them that fast: decoding
one sequence would take as long as the launching does. What is recorded is compared with the step itself before it is
used; where they differ, or nothing can be recorded, steps run as they are, and a warning says so once.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..passes.stateful import StepProgram

Run = Callable[[list[Tensor]], list[Tensor]]
Record = Callable[[Run, list[Tensor]], tuple[Callable[[], None], list[Tensor]]]

MOST = 8  # recordings at a time: the least recently used goes
# The same kernels on the same numbers: only sums in another order may differ.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


def recordable(program: StepProgram, device: torch.device) -> bool:
    """Whether a program's steps may be recorded: on a GPU, with states that stop growing.

    Keys and values of full softmax attention grow with every token, so no step comes again.
    ``LINCOMPILE_CUDA_GRAPHS=0`` in the environment says no for all.
    """
    if device.type != "cuda" or os.environ.get("LINCOMPILE_CUDA_GRAPHS", "1") == "0":
        return False
    return all(None not in spec.shape or program.limit(spec) is not None for spec in program.states)


def cuda_graph(run: Run, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """Records ``run(inputs)``; returns what launches it again, on what ``inputs`` hold then, and where it writes."""
    stream = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs)  # libraries make their workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(inputs)
    return graph.replay, outputs


class Recorded:
    """``run(inputs) -> outputs`` by recordings, one for each combination of shapes that comes a second time.

    Inputs are copied into a recording's own, and what it writes is copied out of it, so nothing that a caller holds
    changes later.

    Args:
        run: does the same for all inputs of the same shapes, without asking the GPU for a value.
        record: what takes the place of ``cuda_graph``.
    """

    def __init__(self, run: Run, device: torch.device, record: Record | None = None) -> None:
        self.run, self.device, self.record = run, device, record or cuda_graph
        self.seen: set[Any] = set()
        self.recordings: OrderedDict[Any, tuple[list[Tensor], Callable[[], None], list[Tensor]]] = OrderedDict()
        self.off = False

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [value.to(self.device) for value in inputs]
        if self.off or self._elsewhere():
            return self.run(given)
        key = tuple((value.shape, value.dtype) for value in given)
        if key not in self.recordings:
            if key not in self.seen:
                self.seen.add(key)
                return self.run(given)
            outputs = self.run(given)
            self._try(key, given, outputs)
            return outputs
        self.recordings.move_to_end(key)
        return self._replay(key, given)

    def _elsewhere(self) -> bool:
        """Whether this call is part of something that a recording can't be."""
        return torch.is_autocast_enabled(self.device.type) or (
            self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        )

    def _replay(self, key: Any, given: list[Tensor]) -> list[Tensor]:
        inputs, launch, outputs = self.recordings[key]
        for mine, value in zip(inputs, given, strict=True):
            mine.copy_(value)
        launch()
        return [value.clone() for value in outputs]

    def _try(self, key: Any, given: list[Tensor], wanted: list[Tensor]) -> None:
        try:
            inputs = [value.clone(memory_format=torch.contiguous_format) for value in given]
            self.recordings[key] = (inputs, *self.record(self.run, inputs))
            found = self._replay(key, given)
        except RuntimeError as error:
            self._give_up(f"couldn't be recorded ({' '.join(str(error).split())[:200]})")
            return
        if not all(map(_same, wanted, found)):
            self._give_up("gave something else when recorded")
        while len(self.recordings) > MOST:
            self.recordings.popitem(last=False)

    def _give_up(self, why: str) -> None:
        self.off = True
        self.recordings.clear()
        warnings.warn(f"lincompile: steps run one kernel after the other, and slower: they {why}", stacklevel=5)


def _same(wanted: Tensor, found: Tensor) -> bool:
    """Whether a recorded output is the plain one, up to rounding."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    a, b = wanted.double().nan_to_num(), found.double().nan_to_num()
    alike = torch.equal(wanted.isfinite(), found.isfinite())
    return alike and float((a - b).norm()) <= _TOLERANCE.get(wanted.dtype, 1e-6) * float(a.norm()) + 1e-12
