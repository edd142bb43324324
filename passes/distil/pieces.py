"""A training step in pieces: recorded, compiled where that agrees, and smaller where a GPU's memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import LincompileError
from .loop import LoopReport
from .regions import agrees
from .replay import Replayed

Learn = Callable[[Tensor, float, bool], Tensor]
"""``learn(tokens [B, T], share, compiled)``: adds ``share`` times the gradients, returns losses."""


class Pieces:
    """Steps of ``learn``, all windows at once until memory runs out, then in pieces half as large, and so on.

    A piece counts by its share of the step's windows. Where a step's loss is a mean over windows, pieces add up to the
    step; where it is a ratio of sums (the transfer's relative errors), they add up to the mean of the pieces' ratios.

    Args:
        compile: use compiled code for the shapes of batches where it computes what plain code does.
        replay: record a step as a CUDA graph.
        report: where ``piece_tokens`` and ``notes`` are kept, so that a resumed run takes the same pieces.
        note: told of both when they don't happen, and of smaller pieces.
    """

    def __init__(
        self,
        learn: Learn,
        parameters: Sequence[nn.Parameter],
        *,
        compile: bool,
        replay: bool,
        report: LoopReport,
        note: Callable[[str], None],
    ) -> None:
        self.learn, self.parameters, self.note = learn, list(parameters), note
        self.compile, self.replay, self.report = compile, replay, report
        self._learners: dict[float, Replayed] = {}  # by the piece's share of the step: the last one may be smaller
        self._compiled: dict[torch.Size, bool] = {}

    def __call__(self, windows: Tensor, step: int) -> Tensor:
        """Adds a step's gradients; returns its losses, float64 on the CPU.

        Raises:
            LincompileError: one window alone doesn't fit into the GPU's memory.
        """
        while True:
            most = self.report.piece_tokens or windows.numel()
            rows = max(1, min(len(windows), most // windows.shape[1]))
            try:
                total = None
                for piece in torch.split(windows, rows):
                    share = len(piece) / len(windows)
                    losses = self._learner(piece, share)(piece).double().cpu() * share
                    total = losses if total is None else total + losses
                assert total is not None
                return total
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise LincompileError(
                        f"one window of {windows.shape[1]} tokens doesn't fit into the GPU's memory: "
                        "give a shorter --length"
                    ) from None
            rows = (rows + 1) // 2
            self.report.piece_tokens = rows * windows.shape[1]
            self._learners.clear()
            for parameter in self.parameters:
                parameter.grad = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            text = f"out of memory at step {step}: now {rows} windows of {windows.shape[1]} tokens at a time"
            self.report.notes.append(text)
            self.note(text)

    def _learner(self, piece: Tensor, share: float) -> Replayed:
        if piece.shape not in self._compiled:
            self._compiled[piece.shape] = self.compile and agrees(
                lambda compiled: self.learn(piece, share, compiled), self.parameters, self.note
            )
        if share not in self._learners:
            self._learners[share] = Replayed(
                lambda tokens: self.learn(tokens, share, self._compiled[tokens.shape]), self.parameters, self.replay
            )
        return self._learners[share]
