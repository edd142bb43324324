"""Running the exported file against the torch step program before it is put into place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..verify import compare

if TYPE_CHECKING:
    from ...passes.stateful import StepProgram


def verify(step: StepProgram, file: Path, quantized: bool) -> dict[str, Any]:
    """What :func:`lincompile.lowering.verify.compare` measures for a file under onnxruntime.

    Raises:
        LincompileError: the logits differ by more than the tolerance, or aren't finite.
    """
    from .session import OnnxSession

    session = OnnxSession(file)
    return compare(step, session, vocabulary=session.vocab_size, quantized=quantized, states=session.initial_states)
