"""Training steps as CUDA graphs: recorded once, then launched as one.

A step of a small model is some ten thousand kernels of a few microseconds, and Python can't launch them that fast: on
an H200 a step of SmolLM2-135M keeps the GPU busy for half of its time. A recorded step has no such gaps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UP = 2  # runs before the recording: Triton compiles, cuBLAS and cuDNN choose


@dataclass
class _Recording:
    """A graph with the buffers it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    result: Tensor
    gradients: list[Tensor | None]


class Replayed:
    """``function(tokens) -> Tensor`` that also adds to the gradients of ``parameters``; on a GPU as CUDA graphs.

    The function must do the same for every batch of one shape, without asking the GPU for a value. A call adds to the
    gradients as the function would: parameters whose ``grad`` is None get the recorded buffers, which the next call
    may overwrite. Each shape of tokens is recorded once, and the recordings share their memory, which is that of the
    largest; on a CPU, or with ``enabled`` False, the function just runs.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], enabled: bool = True
    ) -> None:
        self.function = function
        self.parameters = list(parameters)
        self.enabled = enabled and any(p.is_cuda for p in self.parameters)
        self.recordings: dict[torch.Size, _Recording] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        """The function's result for token windows ``[B, T]`` (any device)."""
        if not self.enabled:
            return self.function(tokens)
        # gradients of an earlier call that are still in recorded buffers, which another recording's memory may overlap
        buffers = {id(gradient) for recording in self.recordings.values() for gradient in recording.gradients}
        before = [parameter.grad for parameter in self.parameters]
        before = [had.clone() if had is not None and id(had) in buffers else had for had in before]
        if tokens.shape not in self.recordings:
            try:
                self.recordings[tokens.shape] = self._record(tokens)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"training steps run unrecorded, and slower: {error}", stacklevel=2)
                self.enabled = False
                self.recordings.clear()
                for parameter, had in zip(self.parameters, before, strict=True):
                    parameter.grad = had
                return self.function(tokens)
        recording = self.recordings[tokens.shape]
        recording.tokens.copy_(tokens)
        recording.graph.replay()
        for parameter, had, new in zip(self.parameters, before, recording.gradients, strict=True):
            parameter.grad = new if had is None else had if new is None else had + new
        return recording.result.clone()

    def _record(self, tokens: Tensor) -> _Recording:
        buffer = tokens.to(self.parameters[0].device, copy=True)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forget()
                self.function(buffer)
        torch.cuda.current_stream().wait_stream(stream)
        self._forget()  # so that the recorded backward pass makes the buffers it writes to
        graph = torch.cuda.CUDAGraph()
        earlier = next(iter(self.recordings.values()), None)
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=None if earlier is None else earlier.graph.pool()):
                result = self.function(buffer)
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own behind
        return _Recording(graph, buffer, result, [parameter.grad for parameter in self.parameters])

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
