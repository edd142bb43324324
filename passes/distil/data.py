"""Token batches for distillation: windows of documents, in an order that a seed and a step number give.

A window never holds tokens of two documents, and nothing is padded. Windows come in a few sizes, the longest halved and
halved again; a document is cut into windows of the largest size that fits it, the last of which ends where the document
ends and so may begin inside the one before. Every size is a shape of its own for what compiles or records steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import LincompileError

SHORTEST = 16  # tokens of the smallest windows; shorter documents teach little
SIZES = 3  # different sizes at most
RARE = 0.05  # a size that covers less of the text than this isn't worth a shape of its own


Made = TypeVar("Made")


class Batches(Protocol):
    """What the stages train on: batches by step number, and windows that no step sees."""

    @property
    def length(self) -> int:
        """Tokens of the longest windows asked for."""

    def step(self, index: int) -> Tensor:
        """Tokens ``[B, T]`` of a step, on the CPU; the same for the same index, whatever was asked before.

        Called ahead, in a thread of its own, while a GPU may be recording the step before.
        """

    def measure(self, count: int) -> Tensor:
        """Up to ``count`` held-out windows ``[n, T]``."""

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on (JSON-able)."""


@dataclass(frozen=True)
class Windows:
    """The windows of one size: where each begins in the stream, those to train on and those held out, ``[W]`` each."""

    size: int
    rows: int
    training: Tensor
    held_out: Tensor

    @property
    def batches(self) -> int:
        """Steps of one epoch; what is left of the windows waits for another epoch's order."""
        return len(self.training) // self.rows


@dataclass(frozen=True)
class TokenWindows:
    """Windows of ``length`` tokens (and of its halves, for shorter documents), shuffled anew each epoch.

    The batch of step ``i`` depends on the seed and ``i`` alone, so a resumed run sees the same data.

    Args:
        ids: the documents' tokens one after another, ``[N]``, int64 (or a smaller integer type, to save memory).
        length: tokens per window.
        batch: windows of that length per step; of windows half as long it is twice as many.
        held_out: share of the windows of each size, at the end of the stream, kept for measuring.
        documents: where each document begins in ``ids``, ascending (None: all is one document).
        multiple: the smaller windows are multiples of so many tokens (the ranks that share each window).

    Raises:
        LincompileError: no size has windows to train on and to hold out, or the starts aren't those of documents.
    """

    ids: Tensor
    length: int
    batch: int
    seed: int = 0
    held_out: float = 0.05
    documents: Tensor | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.length < 2 or self.batch < 1:
            raise LincompileError(f"distillation can't use windows of {self.length} tokens, {self.batch} at a time")
        starts = torch.zeros(1, dtype=torch.int64) if self.documents is None else self.documents
        ordered = len(starts) > 0 and int(starts[0]) == 0 and not bool((starts.diff() < 0).any())
        if not ordered or int(starts[-1]) > self.ids.numel():
            raise LincompileError("the starts of the documents must ascend, from 0 to the number of tokens at most")
        if not self.sizes:
            longest = int(self._lengths.max()) if len(self._lengths) else 0
            raise LincompileError(
                f"the distillation text has {self.ids.numel():,} tokens, less than two windows of {self.length}"
                + (f" in one document (the longest of {len(self._lengths):,} has {longest})" if self._many else "")
                + ": give more text or a shorter --length"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on (JSON-able), for checkpoints to be checked against."""
        starts = 0 if self.documents is None else zlib.crc32(self.documents.contiguous().numpy().tobytes())
        return {
            "tokens": zlib.crc32(self.ids.contiguous().numpy().tobytes()),
            "documents": starts,
            "length": self.length,
            "batch": self.batch,
            "seed": self.seed,
            "held_out": self.held_out,
        } | ({"sizes": [windows.size for windows in self.sizes]} if self.multiple > 1 and self._many else {})

    @cached_property
    def _lengths(self) -> Tensor:
        """Tokens of each document, ``[D]``."""
        if self.documents is None:
            return torch.tensor([self.ids.numel()])
        return torch.cat([self.documents, torch.tensor([self.ids.numel()])]).diff()

    @property
    def _many(self) -> bool:
        return len(self._lengths) > 1

    @cached_property
    def sizes(self) -> list[Windows]:
        """The windows by size, longest first."""
        if self.ids.numel() < 2 * self.length and not self._many:
            return []
        candidates = [self.length]
        halves = 2 * self.multiple
        while self._many and candidates[-1] % halves == 0 and candidates[-1] // 2 >= SHORTEST:
            candidates.append(candidates[-1] // 2)
        while candidates:
            covered = _covered(self._lengths, candidates)
            poorest = min(range(len(candidates)), key=covered.__getitem__)
            found = [self._windows(size, above) for size, above in zip(candidates, [None, *candidates], strict=False)]
            empty = next((i for i, windows in enumerate(found) if windows is None), None)
            rare = covered[poorest] < RARE * sum(covered) or len(candidates) > SIZES
            if empty is None and not rare:
                return [windows for windows in found if windows is not None]
            candidates.pop(poorest if empty is None else empty)  # its documents go to the next smaller size
        return []

    @property
    def unused(self) -> tuple[int, int]:
        """(Documents, tokens) too short for any window."""
        short = self._lengths < self.sizes[-1].size
        return int(short.sum()), int(self._lengths[short].sum())

    def summary(self) -> str:
        """What the text was cut into, in one line."""
        shapes = " and ".join(f"{len(w.training) + len(w.held_out):,} of {w.size} tokens" for w in self.sizes)
        documents, tokens = self.unused
        left = f"; {documents:,} shorter documents ({tokens:,} tokens) are left out" if documents else ""
        return f"{len(self._lengths):,} documents in windows of their own: {shapes}{left}"

    def _windows(self, size: int, above: int | None) -> Windows | None:
        """Windows of the documents that hold ``size`` tokens but not ``above``; None if there aren't two of them."""
        lengths = self._lengths
        ends = lengths.cumsum(0)
        chosen = _served(lengths, size, above)
        lengths, ends = lengths[chosen], ends[chosen]
        counts = (lengths + size - 1) // size  # the last one ends with the document
        document = torch.repeat_interleave(torch.arange(len(counts)), counts)
        place = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts)[document]
        starts = torch.minimum((ends - lengths)[document] + place * size, ends[document] - size)
        kept = max(1, int(len(starts) * self.held_out))
        training, held_out = starts[:-kept], starts[-kept:]
        if len(training):
            training = training[training + size <= held_out[0]]  # none that shares tokens with a held-out one
        if not len(training):
            return None
        return Windows(size, min(self.batch * max(1, self.length // size), len(training)), training, held_out)

    @property
    def training(self) -> int:
        """Number of windows to train on."""
        return sum(len(windows.training) for windows in self.sizes)

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return sum(windows.batches for windows in self.sizes)

    def step(self, index: int) -> Tensor:
        """Tokens ``[rows, size]`` of step ``index``."""
        epoch, position = divmod(index, self.steps)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        orders = [torch.randperm(len(windows.training), generator=generator) for windows in self.sizes]
        if len(self.sizes) > 1:  # sizes take turns at random
            position = int(torch.randperm(self.steps, generator=generator)[position])
        for windows, order in zip(self.sizes, orders, strict=True):
            if position < windows.batches:
                rows = order[position * windows.rows : (position + 1) * windows.rows]
                return self._tokens(windows.training[rows], windows.size)
            position -= windows.batches
        raise AssertionError("a step of an epoch lies in one of its sizes")  # pragma: no cover

    def measure(self, count: int) -> Tensor:
        """Up to ``count`` held-out windows ``[n, size]``, of the size that most windows to train on have tokens in."""
        windows = max(self.sizes, key=lambda windows: len(windows.training) * windows.size)
        return self._tokens(windows.held_out[:count], windows.size)

    def _tokens(self, starts: Tensor, size: int) -> Tensor:
        return self.ids[starts[:, None] + torch.arange(size)].long()


def _served(lengths: Tensor, size: int, above: int | None) -> Tensor:
    """Which documents hold ``size`` tokens but not ``above`` (the next larger size, if any)."""
    return lengths >= size if above is None else (lengths >= size) & (lengths < above)


def _covered(lengths: Tensor, sizes: Sequence[int]) -> list[int]:
    """Tokens of the documents that each size serves."""
    tokens, above = [], None
    for size in sizes:
        tokens.append(int(lengths[_served(lengths, size, above)].sum()))
        above = size
    return tokens


class Ahead(Generic[Made]):
    """``make(index)``, of which the next index's result is made in a thread while this one's is used.

    Retrieval examples are some thousand small tensors a step, as long as a GPU takes for the step itself. Used in a
    ``with``, which ends the thread; what it is making then is dropped.
    """

    def __init__(self, make: Callable[[int], Made]) -> None:
        self.make = make
        self._thread = ThreadPoolExecutor(1, "batches")
        self._waiting: tuple[int, Future[Made]] | None = None

    def __call__(self, index: int) -> Made:
        """What ``make(index)`` gives, and its exception."""
        if self._waiting is None or self._waiting[0] != index:
            self._waiting = index, self._thread.submit(self.make, index)
        made = self._waiting[1].result()
        self._waiting = index + 1, self._thread.submit(self.make, index + 1)
        return made

    def __enter__(self) -> Ahead[Made]:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
