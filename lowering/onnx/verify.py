"""Running the exported file against the torch step program before it is put into place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...passes.errors import LincompileError

if TYPE_CHECKING:
    from ...passes.stateful import StepProgram

# Relative to the largest logit. Quantized activations are compared by their spread: one that lies on the edge between
# two codes flips with the last bit of the sum before it, in torch as much as here, and moves logits by a whole step.
TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 5e-2
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


def verify(step: StepProgram, file: Path, quantized: bool) -> dict[str, Any]:
    """Compare logits over a padded batch in three chunks (prefill, one token, continuation); an encoder's at once.

    Returns:
        ``max_error`` and ``rms_error`` of the logits, relative to the largest logit.

    Raises:
        LincompileError: they differ by more than the tolerance, or aren't finite.
    """
    from .session import OnnxSession

    session = OnnxSession(file)
    generator = torch.Generator().manual_seed(5)
    length = min(sum(_CHUNKS), step.max_positions or sum(_CHUNKS))
    tokens = torch.randint(0, session.vocab_size, (2, length), generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    if not step.uniform_positions:
        mask[0, : length // 3] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected, actual = [], []
    torch_states, onnx_states = step.initial_states(2), session.initial_states(2)
    start = 0
    chunks = _CHUNKS if step.causal else (length,)
    with torch.no_grad():
        for size in chunks:
            part = slice(start, min(start + size, length))
            if part.start < part.stop:
                inputs = tokens[:, part], positions[:, part], mask[:, part]
                logits, torch_states = step(*inputs, torch_states)
                expected.append(logits[mask[:, part]].float())
                logits, onnx_states = session(*inputs, onnx_states)
                actual.append(logits[mask[:, part]])
            start += size
    wanted = torch.cat(expected)
    difference = (torch.cat(actual) - wanted) / wanted.abs().max().clamp(min=1e-6)
    worst, rms = float(difference.abs().max()), float(difference.square().mean().sqrt())
    error, tolerance = (rms, QUANTIZED_TOLERANCE) if quantized else (worst, TOLERANCE)
    if not error <= tolerance:  # NaN too
        raise LincompileError(
            f"the exported model's logits differ from the program's by {error:.2g} (relative; {tolerance:g} is "
            "allowed), so it was not written; please report this model, or export it with another layout"
        )
    return {"max_error": worst, "rms_error": rms}
