"""Token batches for distillation: fixed windows of a token stream, in an order that a seed and a step number give."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LincompileError


@dataclass(frozen=True)
class TokenWindows:
    """Non-overlapping windows of ``length`` tokens from one stream, shuffled anew each epoch.

    The batch of step ``i`` depends on the seed and ``i`` alone, so a resumed run sees the same data.

    Args:
        ids: the stream, ``[N]``, int64 (or a smaller integer type, to save memory).
        length: tokens per window.
        batch: windows per step.
        held_out: share of the windows, at the end of the stream, kept for measuring.
    """

    ids: Tensor
    length: int
    batch: int
    seed: int = 0
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if self.length < 2 or self.batch < 1:
            raise LincompileError(f"distillation can't use windows of {self.length} tokens, {self.batch} at a time")
        if self.ids.numel() < 2 * self.length:
            raise LincompileError(
                f"the distillation text has {self.ids.numel()} tokens, less than two windows of {self.length}: "
                "give more text or a shorter --length"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on (JSON-able), for checkpoints to be checked against."""
        checksum = zlib.crc32(self.ids.contiguous().numpy().tobytes())
        return {
            "tokens": checksum,
            "length": self.length,
            "batch": self.batch,
            "seed": self.seed,
            "held_out": self.held_out,
        }

    @property
    def windows(self) -> Tensor:
        """All windows ``[W, length]``."""
        count = self.ids.numel() // self.length
        return self.ids[: count * self.length].view(count, self.length)

    @property
    def training(self) -> int:
        """Number of windows to train on; at least one is held out."""
        count = self.windows.shape[0]
        return count - max(1, int(count * self.held_out))

    def step(self, index: int) -> Tensor:
        """Tokens ``[batch, length]`` of step ``index``."""
        size = min(self.batch, self.training)
        per_epoch = self.training // size
        epoch, position = divmod(index, per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.training, generator=generator)
        return self.windows[order[position * size : (position + 1) * size]].long()

    def measure(self, count: int) -> Tensor:
        """Up to ``count`` held-out windows ``[n, length]``."""
        return self.windows[self.training :][:count].long()
