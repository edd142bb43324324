"""The states of a batch in the place of transformers' KV cache: reordered with beams, rolled back, checked.

A recurrent state can't be shortened as a KV cache can. Assisted generation needs that, for the candidates that were not
accepted; so while *recording*, a cache keeps the states from before each call. Going back takes the last of them that
is early enough, and the tokens between it and where generation stands are read again, together with the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...passes.errors import LincompileError
from ..artefact.state_file import running_hash

PADDING = -1  # stands for a padded column among the tokens that were read


@dataclass(frozen=True)
class Snapshot:
    """What the states were after ``columns`` tokens (padding included); other members as in :class:`StateCache`."""

    columns: int
    states: list[Tensor]
    lengths: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Prefix:
    """What a state file had read already: how many columns, and per row the hash of their tokens ("" = not said)."""

    columns: int
    hashes: Sequence[str]


class StateCache:
    """What a batch has read so far. A forward pass returns a new one and leaves the one that it was given as it is.

    Attributes:
        model: identity of the artefact whose states these are.
        states: one tensor per state of the step program, batch first.
        lengths: int64 ``[B]``, real tokens read per row. No rows: nothing has been read, by a batch of any size.
        columns: tokens read per row with padding, which is what transformers counts.
        logits: float ``[B, V]`` after the last token, or None where they aren't known.
        tokens: int64 ``[B, columns − prefix.columns]``, the tokens read in this process, ``PADDING`` where padded.
        prefix: what a state file had read before them.
        unread: how many of the last columns aren't in ``states`` (after going back); the next call reads them first.
        closed: rows are padded on the right, so nothing can follow.
        recording: states from before each call are kept in ``snapshots``.
        replay: the next call asks for the logits of what has been read, and reads nothing.
        trusted: the text that comes next is known to begin with what has been read.
        called: the argument that brought it, for messages.
    """

    is_compileable = False
    is_linear = (False,)  # to transformers (since 5.24) a cache of linear layers alone doesn't count what it has read
    crop_keeps = False  # what crop(n) means in the installed transformers; lowering/hf.py sets it
    layers: tuple[Any, ...] = ()

    def __init__(
        self,
        model: str,
        states: Sequence[Tensor] = (),
        lengths: Tensor | None = None,
        columns: int = 0,
        logits: Tensor | None = None,
        *,
        prefix: Prefix | None = None,
        recording: bool = False,
    ) -> None:
        self.model, self.states, self.columns, self.logits = model, list(states), columns, logits
        self.lengths = torch.empty(0, dtype=torch.int64) if lengths is None else lengths
        self.prefix = prefix if prefix is not None else Prefix(0, [""] * self.rows)
        self.tokens = self.lengths.new_empty(self.rows, 0)
        self.unread, self.closed, self.replay, self.trusted = 0, False, False, True
        self.recording, self.called = recording, "the cache"
        self.snapshots: list[Snapshot] = []

    @property
    def rows(self) -> int:
        """The batch size."""
        return self.lengths.shape[0]

    def copy(self) -> StateCache:
        """Another cache of the same tensors: what is done to it leaves this one as it is."""
        new = StateCache.__new__(StateCache)
        new.__dict__.update(self.__dict__, snapshots=list(self.snapshots))
        return new

    def after(self, tokens: Tensor, mask: Tensor, states: list[Tensor], logits: Tensor) -> StateCache:
        """The cache after these tokens ``[B, T]`` (mask: True = real) and what was still to be read before them."""
        new = self.copy()
        if self.recording:
            before = self.lengths - (self.waiting() != PADDING).sum(-1)
            known = None if self.unread else self.logits
            new.snapshots.append(Snapshot(self.columns - self.unread, self.states, before, known))
        new.states, new.logits, new.unread = states, logits, 0
        new.lengths, new.columns = self.lengths + mask.sum(-1), self.columns + tokens.shape[1]
        new.tokens = torch.cat([self.tokens, torch.where(mask, tokens, PADDING)], 1)
        new.closed = not self.columns and not bool(mask[:, -1].all())
        return new

    def known_logits(self) -> Tensor:
        """``logits``; a LincompileError where going back lost them."""
        if self.logits is None:
            raise LincompileError("these states went back to where their logits weren't kept: read one token more")
        return self.logits

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can go back: only with recording."""
        return self.recording

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.columns

    # ---- beams and batches

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow the beams that were chosen."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)), beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, side by side."""
        rows = [row for row in range(self.rows) for _ in range(repeats)]
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0), rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self.reorder_cache(indices)

    def _each(self, change: Callable[[Tensor], Tensor], rows: Sequence[int]) -> None:
        self.prefix = Prefix(self.prefix.columns, [self.prefix.hashes[row] for row in rows])
        self.states = [change(state) for state in self.states]
        self.lengths, self.tokens = change(self.lengths), change(self.tokens)
        self.logits = None if self.logits is None else change(self.logits)
        self.snapshots = []

    # ---- going back

    def activate_past_recording(self) -> None:
        """From now on :meth:`crop` can go back, as far as here."""
        self.recording = True

    def crop(self, length: int) -> None:
        """Goes back: transformers asks for this when candidates weren't accepted.

        Args:
            length: the columns to keep, or minus the columns to drop (0: see ``crop_keeps``).

        Raises:
            LincompileError: to before the recording began.
        """
        keeps = length > 0 or (length == 0 and self.crop_keeps)
        columns = length if keeps else self.columns + length
        if columns >= self.columns:
            self.snapshots = []
            return
        found = next((snapshot for snapshot in reversed(self.snapshots) if snapshot.columns <= columns), None)
        if found is None:
            raise LincompileError(
                f"the states can't go back from {self.columns} tokens to {columns}: only as far as they were recorded "
                "(activate_past_recording)"
            )
        self.tokens = self.tokens[:, : columns - self.prefix.columns]
        self.states, self.columns, self.unread = found.states, columns, columns - found.columns
        self.lengths = found.lengths + (self.waiting() != PADDING).sum(-1)
        self.logits = None if self.unread else found.logits
        self.snapshots = []

    def waiting(self) -> Tensor:
        """The tokens int64 ``[B, unread]`` that the next call reads first, ``PADDING`` where padded."""
        return self.tokens[:, self.tokens.shape[1] - self.unread :]

    # ---- what has been read

    def hashes(self) -> list[str]:
        """:func:`.state_file.running_hash` of each row's tokens, without padding; "" where a state file didn't say."""
        rows = []
        for row, before in zip(self.tokens.tolist(), self.prefix.hashes, strict=True):
            unknown = self.prefix.columns > 0 and not before
            rows.append("" if unknown else running_hash([token for token in row if token != PADDING], before))
        return rows

    def check_beginning(self, tokens: Tensor, mask: Tensor | None) -> None:
        """That ``tokens [B, T]`` (mask: 0 = padding) begin with what has been read.

        Raises:
            LincompileError: they don't, so that the states would continue another text.
        """
        if tokens.shape[0] != self.rows:
            raise LincompileError(f"{self.called}: the states hold {self.rows} rows, the input has {tokens.shape[0]}")
        if tokens.shape[1] < self.columns:
            raise LincompileError(
                f"input_ids has {tokens.shape[1]} tokens, {self.called} has read {self.columns}: give all ids so far "
                "followed by what is new, or an attention_mask that covers both"
            )
        real = torch.ones_like(tokens) if mask is None else mask
        beginning = tokens.where(real[:, : tokens.shape[1]].bool().to(tokens.device), PADDING)[:, : self.columns]
        for index, (row, known) in enumerate(zip(beginning.tolist(), self.hashes(), strict=True)):
            if known and running_hash([token for token in row if token != PADDING]) != known:
                raise LincompileError(
                    f"row {index} of input_ids doesn't begin with the {int(self.lengths[index])} tokens that "
                    f"{self.called} has read: give the ids of the earlier sequences followed by what is new (text "
                    "that is tokenized again or goes through a chat template can give other ids)"
                )
