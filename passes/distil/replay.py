"""Training steps as CUDA graphs: recorded once, then launched as one.

A step of a small model is some ten thousand kernels of a few microseconds, and Python can't launch them that fast: on
an H200 a step of SmolLM2-135M keeps the GPU busy for half of its time. A recorded step has no such gaps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WARM_UP = 2  # runs before the recording: Triton compiles, cuBLAS and cuDNN choose


class Replayed:
    """``function(tokens) -> Tensor`` that also adds to the gradients of ``parameters``; on a GPU as a CUDA graph.

    The function must do the same for every batch of one shape, without asking the GPU for a value. A call adds to the
    gradients as the function would: parameters whose ``grad`` is None get the recorded buffers, which the next call
    overwrites. One shape of tokens is recorded at a time; on a CPU, or with ``enabled`` False, the function just runs.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], enabled: bool = True
    ) -> None:
        self.function = function
        self.parameters = list(parameters)
        self.enabled = enabled and any(p.is_cuda for p in self.parameters)
        self.tokens: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None
        self.gradients: list[Tensor | None] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        """The function's result for token windows ``[B, T]`` (any device)."""
        if not self.enabled:
            return self.function(tokens)
        before = [parameter.grad for parameter in self.parameters]
        if self.tokens is None or self.tokens.shape != tokens.shape:
            try:
                self._record(tokens)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"training steps run unrecorded, and slower: {error}", stacklevel=2)
                self.enabled = False
                for parameter, had in zip(self.parameters, before, strict=True):
                    parameter.grad = had
                return self.function(tokens)
        # gradients of an earlier call that are still in the recorded buffers
        recorded = {id(gradient) for gradient in self.gradients}
        before = [had.clone() if had is not None and id(had) in recorded else had for had in before]
        assert self.tokens is not None and self.graph is not None and self.result is not None
        self.tokens.copy_(tokens)
        self.graph.replay()
        for parameter, had, new in zip(self.parameters, before, self.gradients, strict=True):
            parameter.grad = new if had is None else had if new is None else had + new
        return self.result.clone()

    def _record(self, tokens: Tensor) -> None:
        self.graph, self.result, self.gradients = None, None, []  # frees the memory of another shape
        self.tokens = tokens.to(self.parameters[0].device, copy=True)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forget()
                self.function(self.tokens)
        torch.cuda.current_stream().wait_stream(stream)
        self._forget()  # so that the recorded backward pass makes the buffers it writes to
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.function(self.tokens)
        self.graph = graph
        self.gradients = [parameter.grad for parameter in self.parameters]

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
