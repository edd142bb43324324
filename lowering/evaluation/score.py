"""Log-probabilities of continuations, by the step program: one at a time with shared contexts, or in padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ...passes.errors import LincompileError
from ..chunks import GPU_CHUNK, PREFILL_CHUNK
from ..generate import Prefilled, StepSession, left_pad, prefill

Request = tuple[list[int], list[int]]
"""Token ids of a context and of what follows it."""
Answer = tuple[float, bool]
"""The log-probability of the continuation in nats, and whether greedy decoding would give it."""
BATCH_TOKENS = 16_384  # of a batch, padding included: its logits for the vocabulary are held at once


class Scorer:
    """Scores continuations of contexts.

    Args:
        session: the runtime.
        max_length: tokens that context and continuation may have together (the last of a continuation isn't read);
            contexts are cut on the left.
        chunk: tokens of a context to read at a time.
    """

    def __init__(self, session: StepSession, max_length: int, chunk: int = PREFILL_CHUNK) -> None:
        self.session, self.max_length, self.chunk = session, max_length, chunk
        self._read: tuple[list[int], Prefilled] | None = None

    def score(
        self, requests: Sequence[Request], batch: int = 1, on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """The answers, in the requests' order.

        Args:
            batch: 1: contexts are read once and their state serves each of their continuations (fewest tokens).
                More: so many sequences at a time, context and continuation together (fewest calls, for a GPU).
            on_answer: called with (index of the request, answer) as they come.

        Raises:
            LincompileError: a continuation longer than ``max_length``, an empty context, or logits that aren't finite.
        """
        answers: list[Answer] = [(0.0, True)] * len(requests)
        alone = batch == 1 or self.session.uniform_positions or not self.session.states
        for index, answer in self._one_by_one(requests) if alone else self._in_batches(requests, batch):
            answers[index] = answer
            if on_answer:
                on_answer(index, answer)
        return answers

    def _one_by_one(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        order = sorted(range(len(requests)), key=lambda index: requests[index][0])
        for context, group in groupby(order, key=lambda index: requests[index][0]):
            for index in group:
                yield index, self._score(context, requests[index][1])

    def _score(self, context: list[int], continuation: list[int]) -> Answer:
        if not continuation:
            return 0.0, True
        state = self._after(context[-self._room(continuation) :])
        rows = [state.logits]
        if len(continuation) > 1:
            tokens = torch.tensor([continuation[:-1]])
            prefill(
                self.session,
                tokens,
                torch.ones_like(tokens, dtype=torch.bool),
                after=state,
                collect=lambda _, logits: rows.append(logits[0]),
            )
        return _answer(torch.cat([row.float().cpu() for row in rows]), continuation)

    def _room(self, continuation: list[int]) -> int:
        room = self.max_length - len(continuation) + 1
        if room < 1:
            raise LincompileError(f"a continuation of {len(continuation)} tokens exceeds max_length {self.max_length}")
        return room

    def _after(self, context: list[int]) -> Prefilled:
        """The state after a context, kept for the next continuation of the same one."""
        if self._read is None or self._read[0] != context:
            tokens = torch.tensor([context], dtype=torch.int64)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            self._read = (list(context), prefill(self.session, tokens, mask, chunk=self.chunk))
        return self._read[1]

    def _in_batches(self, requests: Sequence[Request], batch: int) -> Iterator[tuple[int, Answer]]:
        """Rows of context and continuation but its last token; requests with equal rows (one-token answers) share."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(requests):
            if not continuation:
                yield index, (0.0, True)
                continue
            kept = context[-self._room(continuation) :]
            if not kept:
                raise LincompileError("a continuation without a context can't be scored: give at least a BOS token")
            rows.setdefault((*kept, *continuation[:-1]), []).append(index)
        order = sorted(rows, key=len, reverse=True)
        while order:
            size = max(1, min(batch, BATCH_TOKENS // max(1, len(order[0]))))
            some, order = order[:size], order[size:]
            wanted = max(len(requests[index][1]) for row in some for index in rows[row])
            logits = self._ends([list(row) for row in some], wanted)
            for row, values in zip(some, logits, strict=True):
                for index in rows[row]:
                    continuation = requests[index][1]
                    yield index, _answer(values[-len(continuation) :].float().cpu(), continuation)

    def _ends(self, rows: list[list[int]], count: int) -> Tensor:
        """Logits ``[rows, count, V]`` of the last ``count`` tokens of each row."""
        tokens, mask = left_pad(rows)
        parts: list[Tensor] = []
        first = tokens.shape[1] - count

        def keep(start: int, logits: Tensor) -> None:
            if start + logits.shape[1] > first:
                parts.append(logits[:, max(0, first - start) :])

        prefill(self.session, tokens, mask, chunk=min(self.chunk, GPU_CHUNK), collect=keep)  # all logits
        return torch.cat(parts, 1)


def _answer(logits: Tensor, continuation: list[int]) -> Answer:
    targets = torch.tensor(continuation)
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
    if bool(chosen.isnan().any()):  # any answer would then be as good as another, and an accuracy come out
        raise LincompileError("the model's logits are not finite (NaN or inf): its continuations have no score")
    return float(chosen.double().sum()), bool((logits.argmax(-1) == targets).all())
