"""Tiny models as step programs and as ONNX files, for the tests that run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import zoo
from torch import Tensor

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.quantize import Quantize
from lincompile.passes.stateful import StepProgram, make_stateful

if TYPE_CHECKING:
    from lincompile.lowering.onnx.export import OnnxReport
    from lincompile.lowering.onnx.session import OnnxSession


@dataclass
class Exported:
    step: StepProgram
    folder: Path
    report: OnnxReport
    session: OnnxSession


def step_program(model: str, attn: str, quant: str | None = None, **options: Any) -> StepProgram:
    """A rewritten model of the zoo (``options``: of ``LinearizeAttention``), a third of whose features forget fast."""
    module, example = zoo.build(model)
    linearize = LinearizeAttention(attn, **options)
    passes: list[Any] = [Canonicalize(), ProveAttention(), linearize]
    if quant:
        passes.append(Quantize(quant))
    program = Pipeline(passes)(capture(module, example))
    with torch.no_grad():
        for name, parameter in program.graph_module.named_parameters():
            if name.endswith("gate.bias"):
                parameter[::3] = -40.0  # below the floor, where the gates have one
    return make_stateful(program, check=False)


def batch(step: StepProgram, lengths: Sequence[int] = (13, 9, 12)) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded tokens, positions and mask."""
    longest = max(lengths)
    tokens = torch.randint(3, zoo.VOCAB, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens, (mask.long().cumsum(1) - 1).clamp(min=0), mask


# The SmolLM2 head layout (9 query and 3 key heads) with one kept softmax layer, and with softmax alone; six-bit
# weights; sliding layers; a window beside linear attention, also by the native library's operators, where the linear
# part reads queries and keys before or after their rotary embedding; the delta rule.
CASES: dict[str, dict[str, Any]] = {
    "hybrid": {"model": "llama-gqa", "attn": "lawcat", "keep": (1,)},
    "softmax": {"model": "llama-gqa", "attn": "softmax"},
    "int6": {"model": "llama-gqa", "attn": "lawcat", "quant": "w6a8"},
    "hedgehog-sliding": {"model": "gemma3", "attn": "hedgehog"},
    "window": {"model": "llama-gqa", "attn": "lawcat", "window": 4},
    "window-native": {"model": "llama-gqa", "attn": "lawcat", "window": 4},
    "window-rotated-native": {"model": "llama-gqa", "attn": "lawcat", "window": 4, "rotary": "keep"},
    "delta-a6": {"model": "llama", "attn": "gated-delta", "quant": "w6a6"},
}


def export_case(name: str, folder: Path) -> Exported:
    """One of ``CASES`` written to ``folder`` and opened there."""
    from lincompile.lowering.onnx.export import export_onnx
    from lincompile.lowering.onnx.session import OnnxSession

    step = step_program(**CASES[name])
    layout = "native" if name.endswith("-native") else "planes"
    report = export_onnx(step, folder, layout=layout, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    return Exported(step, folder, report, OnnxSession(folder, threads=2))
