"""The end of a model for some of a chunk's tokens: which operators get fewer rows, and which may not."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lincompile.lowering.onnx.chosen_rows import choose_logits
from lincompile.lowering.onnx.metadata import LOGITS_FROM

# x [B, T, 4] → a sum over all tokens → o → residual → gated layer → head. BETWEEN stands where the last layer begins.
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
agraph (float[B, T, 4] x) => (float[B, T, 5] logits{extra})
<float[4, 4] o, float[4, 6] gate, float[4, 6] up, float[6, 4] down, float[4] weight, float[4, 5] head,
 int64[1] one = {{1}}, int64[1] last = {{-1}}, float power = {{2.0}}>
{{
  mixed = CumSum (x, one)
  product = MatMul (mixed, o)
  residual = Add (x, product)
  square = Pow (residual, power)
  mean = ReduceMean (square, last)
  root = Sqrt (mean)
  scaled = Div (residual, root)
  normed = Mul (scaled, weight)
  gated = MatMul (normed, gate)
  open = Sigmoid (gated)
  act = Mul (gated, open)
  wide = MatMul (normed, up)
  inner = Mul (act, wide)
  out = MatMul (inner, down)
  summed = Add (residual, out)
  {between}
  logits = MatMul (hidden, head)
  {after}
}}
"""


OFFSET = "float[1, 7, 1] {1, 2, 3, 4, 5, 6, 7}"


def made(between: str = "hidden = Tanh (summed)", extra: str = "", after: str = "") -> ir.Model:
    proto = onnx.parser.parse_model(MODEL.format(between=between, extra=extra, after=after))
    random = np.random.default_rng(0)
    del proto.graph.initializer[:]
    shapes = {"o": (4, 4), "gate": (4, 6), "up": (4, 6), "down": (6, 4), "weight": (4,), "head": (4, 5)}
    stored = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    stored |= {"one": np.array(1), "last": np.array([-1]), "power": np.array(2.0, np.float32)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in stored.items())
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def rows_of(model: ir.Model) -> dict[str, object]:
    """The tokens axis of what each operator gives."""
    return {
        str(node.outputs[0].name): str(node.outputs[0].shape[1])
        for node in model.graph
        if node.outputs[0].shape is not None and len(node.outputs[0].shape) == 3
    }


def compare(model: ir.Model, before: onnx.ModelProto) -> None:
    after = ir.serde.serialize_model(model)
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(1).normal(size=(2, 7, 4)).astype(np.float32)
    full, fewer = (ort.InferenceSession(proto.SerializeToString()) for proto in (before, after))
    (want, *_), (have, *_) = full.run(None, {"x": x}), fewer.run(None, {"x": x})
    assert np.array_equal(want, have)
    for start in (0, 3, 6, -1, -2, -7, -99, 7, 50):
        (have, *_) = fewer.run(None, {"x": x, LOGITS_FROM: np.array([start])})
        assert have.shape == want[:, start:].shape
        assert np.allclose(want[:, start:], have, rtol=1e-5, atol=1e-6)


def test_what_follows_the_last_mixing_gets_the_wanted_rows() -> None:
    model = made()
    before = ir.serde.serialize_model(model)
    assert choose_logits(model)
    rows = rows_of(model)
    assert rows["mixed"] == "T"
    assert all(rows[name] == "kept" for name in ("product", "residual", "normed", "inner", "summed", "logits"))
    slices = [node for node in model.graph if node.op_type == "Slice"]
    assert [str(node.inputs[0].name) for node in slices if node.inputs[0]] == ["mixed", "x"]
    compare(model, before)


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        # The residual stream, or what the last layer makes of it, is read by something that mixes tokens.
        ({"extra": ", float[B, T, 4] other", "after": "other = CumSum (residual, one)"}, {"residual", "product"}),
        ({"extra": ", float[B, T, 4] summed"}, {"residual", "product", "normed", "summed"}),
        ({"between": "hidden = CumSum (summed, one)"}, {"residual", "product", "normed", "summed", "hidden"}),
        # A stored tensor with an axis of tokens broadcasts along it.
        (
            {"between": f"offset = Constant <value = {OFFSET}> ()\n hidden = Add (summed, offset)"},
            {"residual", "product", "normed", "summed", "hidden"},
        ),
    ],
)  # fmt: skip
def test_what_others_read_keeps_all_rows(options: dict[str, str], whole: set[str]) -> None:
    model = made(**options)
    before = ir.serde.serialize_model(model)
    assert choose_logits(model)
    rows = rows_of(model)
    assert {name for name in whole if rows.get(name) == "kept"} == set()
    assert rows["logits"] == "kept"
    compare(model, before)
