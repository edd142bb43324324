"""Perplexity and speed, by the same code for the teacher (a captured program) and the student (a step program)."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...passes.errors import LincompileError
from ...passes.inputs import beyond_text, model_values, settle
from ...passes.program import Program
from ..generate import StepSession, generate, prefill

PROBE = 32  # tokens that a model is asked about before the text, to see whether it is causal
# Of the largest logit: more than rounding makes of it, where experts, say, see tokens in other batches.
CHANGE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
LogitsOf = Callable[[Tensor], Iterator[tuple[int, Tensor]]]
"""tokens ``[1, T]`` → (index of the first token, logits ``[1, t, V]``) in chunks that cover all T tokens."""


@dataclass(frozen=True)
class Perplexity:
    """``perplexity`` = exp(``nll``); ``nll`` in nats per token; ``tokens`` = how many were predicted."""

    perplexity: float
    nll: float
    tokens: int

    def record(self) -> dict[str, Any]:
        """The JSON of ``lincompile eval``."""
        return asdict(self)


def logits_of_program(program: Program) -> LogitsOf:
    """One forward of the captured graph per window.

    Raises:
        LincompileError: the program takes something other than tokens, a padding mask and positions.
    """
    if unknown := beyond_text(program):
        raise LincompileError(f"perplexity needs a language model: this one takes '{unknown[0]}'")
    settle(program)

    def logits_of(tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        with torch.no_grad():
            logits = program(**model_values(program, tokens))
        yield 0, logits[0] if isinstance(logits, (tuple, list)) else logits

    return logits_of


def logits_of_session(session: StepSession, chunk: int = 512) -> LogitsOf:
    """Chunked prefill from fresh states per window: exactly what generation computes."""

    def logits_of(tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        parts: list[tuple[int, Tensor]] = []
        prefill(
            session,
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            chunk=chunk,
            collect=lambda start, logits: parts.append((start, logits)),
        )
        yield from parts

    return logits_of


def perplexity(
    logits_of: LogitsOf,
    ids: Sequence[int],
    context: int,
    *,
    tokens: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
    add_up: Callable[[float], float] = lambda total: total,
) -> Perplexity:
    """Perplexity over non-overlapping windows, no BOS added: each window predicts its tokens but the first.

    Args:
        logits_of: :func:`logits_of_program` or :func:`logits_of_session`.
        ids: the text's token ids.
        context: tokens per window; the last window may be shorter.
        tokens: stop after so many predicted tokens (None = the whole text).
        on_window: called with (predicted tokens so far, predicted tokens in all) after each window.
        add_up: from this process's share of the negative log-likelihood to all of it, if ``logits_of`` gives shares.

    Raises:
        LincompileError: a context or text too short to predict anything, a model that reads the tokens it is to
            predict, or logits that aren't finite.
    """
    if context < 2:
        raise LincompileError(f"the context must be at least 2 tokens, not {context}")
    if tokens is not None and tokens < 1:
        raise LincompileError(f"the number of tokens must be at least 1, not {tokens}")
    windows = [list(ids[start : start + context]) for start in range(0, len(ids), context)]
    available = sum(len(window) - 1 for window in windows)
    wanted = available if tokens is None else min(tokens, available)
    if wanted < 1:
        raise LincompileError(f"the text has {len(ids)} tokens: perplexity needs at least 2")
    _check_causal(logits_of, windows[0][:PROBE], add_up)
    total, predicted = 0.0, 0
    for window in windows:
        window = window[: wanted - predicted + 1]
        if len(window) < 2:
            break
        sequence = torch.tensor([window], dtype=torch.int64)
        for start, logits in logits_of(sequence):
            targets = sequence[0, start + 1 : start + 1 + logits.shape[1]]
            total += _negative_log_likelihood(logits[0, : len(targets)], targets)
        predicted += len(window) - 1
        if on_window:
            on_window(predicted, wanted)
    nll = add_up(total) / predicted
    if not math.isfinite(nll):
        raise LincompileError("the model's logits are not finite (NaN or inf): perplexity has no value")
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, predicted)


def _check_causal(logits_of: LogitsOf, ids: list[int], add_up: Callable[[float], float]) -> None:
    """Asks the model itself: a program without states can be causal, and a captured one may hold unproved attention."""
    last = len(ids) - 1
    original = torch.tensor([ids], dtype=torch.int64)
    changed = original.clone()
    changed[0, last] = int(ids[last] == 0)
    differing = 0
    for (start, ours), (_, theirs) in zip(list(logits_of(original)), list(logits_of(changed)), strict=True):
        change = CHANGE.get(ours.dtype, 1e-3)
        a, b = (logits[0, : max(0, last - start)].float() for logits in (ours, theirs))
        finite = a.isfinite() & b.isfinite()
        if bool(finite.any()):
            differing += bool((a - b)[finite].abs().max() > change * a[finite].abs().max())
    if add_up(float(differing)):
        raise LincompileError(
            "the model isn't causal: what it says of a token depends on the tokens after it, so that it would read "
            "what it is to predict, and perplexity has no meaning; compare its outputs with its teacher's instead"
        )


def _negative_log_likelihood(logits: Tensor, targets: Tensor, rows: int = 256) -> float:
    """Sum over tokens, in float32 (summed in float64), a few rows at a time: a vocabulary's worth of floats is big."""
    total = 0.0
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        each = functional.cross_entropy(logits[part].float().cpu(), targets[part], reduction="none")
        total += float(each.double().sum())
    return total


def bench(session: StepSession, *, context: int = 1024, new_tokens: int = 32) -> dict[str, Any]:
    """Speed and memory of one sequence: prefill of ``context`` tokens, then greedy decoding.

    Returns:
        ``context``, ``prefill_tokens_per_second``, ``decode_tokens_per_second``, ``state_bytes`` (as held at the end),
        ``peak_memory_bytes`` (of the whole process so far; of the GPU's allocator where it runs there).

    Raises:
        LincompileError: context and new tokens together exceed the model's positions.
    """
    if context < 1 or new_tokens < 2:
        raise LincompileError("bench needs a context of at least 1 token and at least 2 new tokens")
    if session.max_positions is not None and context + new_tokens > session.max_positions:
        raise LincompileError(
            f"{context} + {new_tokens} tokens exceed the model's {session.max_positions} positions: lower --context"
        )
    prompt = torch.randint(session.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    generate(session, [prompt[:2]], 2)  # the first call pays for lazy initialisation
    result = generate(session, [prompt], new_tokens)
    return {
        "context": context,
        "new_tokens": len(result.tokens[0]),
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "state_bytes": sum(state.nbytes for state in result.state.states),
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Most bytes this process has held at once: resident memory, or the GPU allocator's peak where one was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
