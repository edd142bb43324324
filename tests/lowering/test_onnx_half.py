"""Models in bfloat16 and float16: the file computes in float32 and stores their 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from lincompile.lowering.onnx.export import MODEL_FILE, export_onnx  # noqa: E402
from lincompile.lowering.onnx.half import widened  # noqa: E402
from lincompile.lowering.onnx.session import OnnxSession  # noqa: E402
from lincompile.passes.canonicalize import Canonicalize  # noqa: E402
from lincompile.passes.capture import capture  # noqa: E402
from lincompile.passes.identity import ProveAttention  # noqa: E402
from lincompile.passes.linearize import LinearizeAttention  # noqa: E402
from lincompile.passes.pipeline import Pipeline  # noqa: E402
from lincompile.passes.quantize import Quantize  # noqa: E402
from lincompile.passes.stateful import StepProgram, make_stateful  # noqa: E402


def step_program(dtype: torch.dtype, quant: str | None) -> StepProgram:
    module, example = zoo.build("llama-gqa")
    passes: list[Any] = [Canonicalize(), ProveAttention(), LinearizeAttention("lawcat", keep=(1,))]
    passes += [Quantize(quant)] if quant else []
    return make_stateful(Pipeline(passes)(capture(module.to(dtype), example)), check=False)


@pytest.mark.parametrize(("dtype", "quant"), [(torch.bfloat16, None), (torch.float16, "w6a16")])
def test_a_model_in_half_precision(dtype: torch.dtype, quant: str | None, tmp_path: Path) -> None:
    step = step_program(dtype, quant)
    report = export_onnx(step, tmp_path)
    # The file against the widened program, exactly; against the program itself to what 16 bits round.
    assert report.verified["max_error"] < 1e-4 and 1e-5 < report.verified["rms_from_half"] < 2e-2
    name = str(dtype).removeprefix("torch.")
    assert any(name in note for note in report.notes)
    proto = onnx.load(tmp_path / MODEL_FILE)
    kinds = {item.name: item.data_type for item in proto.graph.initializer}
    half = {kind for weight, kind in kinds.items() if "embed_tokens" in weight}
    assert half == {onnx.TensorProto.BFLOAT16 if dtype == torch.bfloat16 else onnx.TensorProto.FLOAT16}
    assert all(spec.dtype in (torch.float32, torch.bool) for spec in OnnxSession(tmp_path).states)
    onnx.checker.check_model(proto, full_check=True)
    # The program that was handed in is as it was.
    assert next(iter(step.graph_module.parameters())).dtype == dtype


def test_what_is_widened_is_the_same_number_and_float32_stays() -> None:
    step = step_program(torch.bfloat16, None)
    wide, found = widened(step)
    assert found == {torch.bfloat16}
    old, new = dict(step.graph_module.named_parameters()), dict(wide.graph_module.named_parameters())
    assert old.keys() == new.keys() and all(torch.equal(new[name], old[name].float()) for name in old)
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    assert widened(wide) == (wide, set())
