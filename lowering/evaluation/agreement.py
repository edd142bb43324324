"""How a student writes, beside how well it predicts: its greedy continuations against the teacher's.

A student can be close in log-likelihood and far when it writes, because there its own errors are what it reads next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...passes.errors import LincompileError
from ..generate import NO_STEP_FORM, Prefilled, generate, prefill
from .subject import Subject

NGRAM = 4


@dataclass(frozen=True)
class Writing:
    """What to write.

    Args:
        prompts: windows of the text, evenly spaced over it.
        prompt_tokens: tokens of each.
        new_tokens: tokens to write after each, whatever they are (an end-of-text token doesn't end a continuation, so
            that all have one length).
        batch: prompts at a time.

    Raises:
        LincompileError: nothing to write.
    """

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    batch: int = 16

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.prompt_tokens < 1 or self.batch < 1:
            raise LincompileError("comparing what models write needs at least one prompt of at least one token")
        if self.new_tokens < NGRAM:
            raise LincompileError(f"comparing what models write needs at least {NGRAM} new tokens")


@dataclass
class Agreement:
    """The figures; see ``record``. One entry per prompt in each list."""

    options: Writing
    chosen: list[float] = field(default_factory=list)
    prefix: list[int] = field(default_factory=list)
    distinct: dict[str, list[float]] = field(default_factory=lambda: {"teacher": [], "student": []})
    nll: dict[str, list[float]] = field(default_factory=lambda: {"teacher": [], "student": []})

    def record(self) -> dict[str, Any]:
        """JSON.

        ``agreement``: share of the teacher's greedy tokens that the student chooses too, reading the teacher's text.
        ``same_tokens``: tokens until the first difference, each reading its own text; ``same_whole``: share of
        continuations without one. ``distinct``: share of different 4-grams among all of a continuation (a text that
        goes in circles has few). ``nll``: what the continuations cost by the teacher's own reckoning, in nats per
        token.
        """
        wanted = self.options.new_tokens
        return {
            "agreement": _mean(self.chosen),
            "same_tokens": _mean(self.prefix),
            "same_whole": _mean([count == wanted for count in self.prefix]),
            "distinct": {name: _mean(values) for name, values in self.distinct.items()},
            "nll": {name: _mean(values) for name, values in self.nll.items()},
            "prompts": len(self.prefix),
            "prompt_tokens": self.options.prompt_tokens,
            "new_tokens": wanted,
        }


def compare(
    student: Subject,
    teacher: Subject,
    ids: Sequence[int],
    options: Writing,
    on_prompts: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Both continue windows of a text, and the student reads what the teacher wrote, the teacher what both did.

    Args:
        ids: the text's token ids.
        on_prompts: called with (prompts done, prompts).

    Raises:
        LincompileError: other vocabularies, no step form, a text or model too short.
    """
    if student.session.vocab_size != teacher.session.vocab_size:
        raise LincompileError(
            f"{student.name} knows {student.session.vocab_size} tokens and {teacher.name} {teacher.session.vocab_size}:"
            " what they write can't be compared"
        )
    needed = options.prompt_tokens + options.new_tokens
    for subject in (student, teacher):
        if not subject.session.states:
            raise LincompileError(f"{subject.name}: {NO_STEP_FORM}")
        limit = subject.session.max_positions
        if limit is not None and needed > limit:
            raise LincompileError(f"{needed} tokens exceed the {limit} positions of {subject.name}: write fewer")
    if len(ids) < options.prompt_tokens:
        raise LincompileError(f"the text has {len(ids)} tokens, less than a prompt of {options.prompt_tokens}")
    last = len(ids) - options.prompt_tokens
    count = min(options.prompts, last + 1)
    starts = [round(index * last / max(1, count - 1)) for index in range(count)]
    windows = [list(ids[start : start + options.prompt_tokens]) for start in starts]
    result = Agreement(options)
    for begin in range(0, count, options.batch):
        _compare(student, teacher, windows[begin : begin + options.batch], result)
        if on_prompts:
            on_prompts(len(result.prefix), count)
    return result


def _compare(student: Subject, teacher: Subject, windows: list[list[int]], result: Agreement) -> None:
    new = result.options.new_tokens
    prompt = torch.tensor(windows)
    before = {name: _read(who, prompt) for name, who in (("teacher", teacher), ("student", student))}
    empty: list[list[int]] = [[] for _ in windows]
    written = {
        name: torch.tensor(generate(who.session, empty, new, after=before[name]).tokens)
        for name, who in (("teacher", teacher), ("student", student))
    }
    same = (written["student"] == written["teacher"]).long().cumprod(1).sum(1)
    result.prefix += same.tolist()
    followed = _logits(student, before["student"], written["teacher"]).argmax(-1)
    result.chosen += (followed == written["teacher"]).double().mean(1).tolist()
    for name, tokens in written.items():
        result.distinct[name] += [distinct(row) for row in tokens.tolist()]
        logits = _logits(teacher, before["teacher"], tokens).float().log_softmax(-1)
        result.nll[name] += (-logits.gather(-1, tokens[..., None])[..., 0]).double().mean(1).tolist()


def _read(subject: Subject, tokens: torch.Tensor) -> Prefilled:
    return prefill(subject.session, tokens, torch.ones_like(tokens, dtype=torch.bool), chunk=subject.chunk)


def _logits(subject: Subject, before: Prefilled, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, N, V]`` that predict ``tokens [B, N]`` after a prompt."""
    parts = [before.logits[:, None].cpu()]
    read = tokens[:, :-1]
    mask = torch.ones_like(read, dtype=torch.bool)
    prefill(subject.session, read, mask, after=before, collect=lambda _, logits: parts.append(logits.cpu()))
    return torch.cat(parts, 1)


def distinct(tokens: Sequence[int], n: int = NGRAM) -> float:
    """The share of different n-grams among all: 1 where nothing is repeated."""
    grams = [tuple(tokens[index : index + n]) for index in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
