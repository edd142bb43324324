"""Running the exported file against the torch step program before it is put into place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..verify import compare

if TYPE_CHECKING:
    from ...passes.stateful import StepProgram


def verify_widened(step: StepProgram, wide: StepProgram, vocabulary: int) -> dict[str, Any]:
    """How far a program in 16 bits is from its float32 form, as ``rms_from_half`` (relative to the largest logit).

    Raises:
        LincompileError: further than 16 bits explain.
    """
    measured = compare(step, wide, vocabulary=vocabulary, quantized=True, states=wide.initial_states)
    return {"rms_from_half": measured["rms_error"]}


def verify(step: StepProgram, file: Path, quantized: bool) -> dict[str, Any]:
    """What :func:`lincompile.lowering.verify.compare` measures for a file under onnxruntime.

    Raises:
        LincompileError: the logits differ by more than the tolerance, or aren't finite.
    """
    from .session import OnnxSession

    session = OnnxSession(file)
    return compare(step, session, vocabulary=session.vocab_size, quantized=quantized, states=session.initial_states)
