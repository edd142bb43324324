"""Running what was exported against the torch step program before it is put into place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..passes.errors import LincompileError
from ..passes.stateful import StepProgram

Run = Callable[..., tuple[Tensor, list[Tensor]]]
# Relative to the largest logit.
TOLERANCE = 1e-3
# Quantized activations are compared by their spread, and against the program's own: one that lies on the edge between
# two codes flips with the last bit of the sum before it, in torch as much as here, and moves logits by a whole step.
QUANTIZED_TOLERANCE = 5e-2
_SENSITIVITY_FACTOR = 4.0  # the perturbation that measures it and the rounding that it stands for are of like size only
_PERTURBATION = 1e-6
_CHUNKS = (5, 1, 3)


@contextmanager
def holding(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """``tensor`` holds ``values`` for a while: the program with its embedding rounded as the file's is."""
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(values)
        try:
            yield
        finally:
            tensor.copy_(before)


def compare(
    step: StepProgram,
    run: Run,
    *,
    vocabulary: int,
    quantized: bool,
    states: Callable[[int], list[Tensor]],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Compares logits over a padded batch in three chunks (prefill, one token, continuation); an encoder's at once.

    Args:
        step: the program that was exported.
        run: what was made of it: ``(tokens, positions, mask, states) -> (logits, states)``.
        vocabulary: number of token ids.
        quantized: activations are rounded.
        states: fresh states of ``run`` for so many rows.
        device: where both run.

    Returns:
        ``max_error`` and ``rms_error`` of the logits, relative to the largest logit; for quantized activations also
        ``sensitivity``, the spread of the program's own logits when one weight tensor moves by 1e-6.

    Raises:
        LincompileError: they differ by more than the tolerance, or aren't finite.
    """
    tokens, positions, mask = _inputs(vocabulary, step)
    inputs = (tokens.to(device), positions.to(device), mask.to(device))
    chunks = _CHUNKS if step.causal else (tokens.shape[1],)
    wanted = _logits(step, step.initial_states(2, device), inputs, chunks)
    worst, rms = _difference(_logits(run, states(2), inputs, chunks), wanted)
    measured = {"max_error": worst, "rms_error": rms}
    error, tolerance = worst, TOLERANCE
    if quantized:
        measured["sensitivity"] = _sensitivity(step, wanted, inputs, chunks)
        error, tolerance = rms, max(QUANTIZED_TOLERANCE, _SENSITIVITY_FACTOR * measured["sensitivity"])
    if not error <= tolerance:  # NaN too
        raise LincompileError(
            f"the exported model's logits differ from the program's by {error:.2g} (relative; {tolerance:.2g} is "
            "allowed), so it was not written; please report this model, or export it with another layout"
        )
    return measured


def _inputs(vocabulary: int, step: StepProgram) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of random tokens, the first padded on the left where rows may differ; positions; mask."""
    length = min(sum(_CHUNKS), step.max_positions or sum(_CHUNKS))
    tokens = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, length, dtype=torch.bool)
    if not step.uniform_positions:
        mask[0, : length // 3] = False
    return tokens, (mask.long().cumsum(1) - 1).clamp(min=0), mask


@torch.no_grad()
def _logits(
    run: Run,
    states: list[Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    chunks: Sequence[int],
) -> Tensor:
    """Logits of the real tokens ``[N, V]``."""
    parts, start, length = [], 0, inputs[0].shape[1]
    for size in chunks:
        tokens, positions, mask = (value[:, start : min(start + size, length)] for value in inputs)
        if tokens.shape[1]:
            logits, states = run(tokens, positions, mask, states)
            parts.append(logits[mask].float())
        start += size
    return torch.cat(parts)


def _difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Largest and root mean square, relative to the largest value of ``other``."""
    difference = (one - other) / other.abs().max().clamp(min=1e-6)
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def _sensitivity(
    step: StepProgram, wanted: Tensor, inputs: tuple[Tensor, Tensor, Tensor], chunks: Sequence[int]
) -> float:
    """How far the program's logits spread when its largest float matrix (the embedding, as a rule) moves by 1e-6."""
    matrices = [p for p in step.graph_module.parameters() if p.dim() > 1 and p.is_floating_point()]
    if not matrices:
        return 0.0
    matrix = max(matrices, key=torch.Tensor.numel)
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(6)).to(matrix.device)
    with holding(matrix, matrix.detach() * (1 + _PERTURBATION * noise)):
        return _difference(_logits(step, step.initial_states(2, inputs[0].device), inputs, chunks), wanted)[1]
