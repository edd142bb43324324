"""Norms, gates and look-ups of the native library: torch's numbers and their bodies', and which graphs take them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

import native_kernels  # noqa: E402
from onnx import parser  # noqa: E402

from lincompile.kernels.int6_linear.codes import dequantize, quantize_weight  # noqa: E402
from lincompile.lowering.native import library  # noqa: E402
from lincompile.lowering.native.library import DOMAIN  # noqa: E402
from lincompile.lowering.onnx import native  # noqa: E402
from lincompile.lowering.onnx.layers import fuse_layers  # noqa: E402
from lincompile.lowering.onnx.quantized import plane_of_codes, unsigned  # noqa: E402

TYPES = {"float32": ir.DataType.FLOAT, "uint8": ir.DataType.UINT8, "float16": ir.DataType.FLOAT16}
TYPES |= {"int64": ir.DataType.INT64}
Arrays = dict[str, Any]


@pytest.fixture(params=[*native_kernels.KERNELS, native_kernels.BODY])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return native_kernels.use(request.param, monkeypatch)


def call(name: str, feed: Arrays, outputs: int = 1, **attributes: Any) -> list[Any]:
    """One node over graph inputs of any size."""
    given = [
        ir.Value(
            name=key,
            type=ir.TensorType(TYPES[str(array.dtype)]),
            shape=ir.Shape([f"{key}_{axis}" for axis in range(array.ndim)]),
        )
        for key, array in feed.items()
    ]
    node = ir.node(name, given, attributes, domain=DOMAIN, num_outputs=outputs)
    rank = 3
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([f"y{index}_{axis}" for axis in range(rank)])
    graph = ir.Graph(given, node.outputs, nodes=[node], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    native.attach(model, name)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    library.register(options)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


@pytest.mark.parametrize("width", [1, 5, 64, 577])
def test_norms(kernels: str, width: int) -> None:
    torch.manual_seed(width)
    x, residual, weight = torch.randn(2, 3, width) * 3, torch.randn(2, 3, width), torch.randn(width)
    x[0, 1], residual[0, 1] = 0, 0
    feed = {"x": x.numpy(), "weight": weight.numpy()}
    wide = torch.nn.functional.rms_norm(x.double(), [width], weight.double(), 1e-5)
    (y,) = call("RmsNorm", feed, epsilon=1e-5)
    np.testing.assert_allclose(y, wide.numpy(), rtol=2e-6, atol=1e-7)
    total = x + residual
    wide = torch.nn.functional.rms_norm(total.double(), [width], weight.double(), 1e-5)
    feed = {"x": x.numpy(), "residual": residual.numpy(), "weight": weight.numpy()}
    y, found = call("AddRmsNorm", feed, 2, epsilon=1e-5)
    np.testing.assert_array_equal(found, total.numpy())
    np.testing.assert_allclose(y, wide.numpy(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("width", [1, 5, 64, 99])
def test_swiglu(kernels: str, width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(2, 3, 2 * width) * 5
    x[0, 0, 0], x[0, 1, 0], x[1, 1, width - 1] = -200.0, 200.0, float("nan")
    gate, up = x.double().chunk(2, -1)
    (y,) = call("SwiGlu", {"x": x.numpy()})
    smallest = 1e-5 if kernels == "body" else 1e-30  # onnxruntime's Sigmoid has an absolute error
    np.testing.assert_allclose(y, (torch.nn.functional.silu(gate) * up).numpy(), rtol=2e-6, atol=smallest)


@pytest.mark.parametrize("width", [4, 128, 200])
def test_rows_of_a_six_bit_table(kernels: str, width: int) -> None:
    torch.manual_seed(width)
    codes, scale = quantize_weight(torch.randn(50, width))
    ids = torch.tensor([[3, 49, 0], [7, 7, 12]])
    plain = unsigned(codes)
    feed = {"ids": ids.numpy(), "high": plane_of_codes(plain >> 2, 4), "low": plane_of_codes(plain & 3, 2)}
    (y,) = call("Int6Rows", feed | {"scale": scale.numpy()}, K=width)
    np.testing.assert_array_equal(y, dequantize(codes, scale)[ids].numpy())


def test_wrong_shapes_are_errors(kernels: str) -> None:
    if kernels == "body":
        pytest.skip("onnxruntime's own messages")
    x, weight = np.ones((1, 2, 6), np.float32), np.ones(6, np.float32)
    with pytest.raises(Exception, match=r"weight must be as long as x's last axis, got \[5\] for \[1, 2, 6\]"):
        call("RmsNorm", {"x": x, "weight": weight[:5]}, epsilon=1e-5)
    with pytest.raises(Exception, match=r"residual must be \[1, 2, 6\], got \[1, 1, 6\]"):
        call("AddRmsNorm", {"x": x, "residual": x[:, :1], "weight": weight}, 2, epsilon=1e-5)
    with pytest.raises(Exception, match=r"x's last axis must be even, got \[1, 2, 5\]"):
        call("SwiGlu", {"x": x[..., :5]})
    ids, bytes_ = np.array([[1, 7]]), np.zeros((7, 4), np.uint8)
    table = {"high": bytes_, "low": bytes_[:, :2], "scale": np.ones((7, 1), np.float16)}
    with pytest.raises(Exception, match="id 7 is outside the table's 7 rows"):
        call("Int6Rows", {"ids": ids} | table, K=8)
    with pytest.raises(Exception, match=r"low must have 2 columns for K = 8 .* got \[7, 1\]"):
        call("Int6Rows", {"ids": ids} | table | {"low": bytes_[:, :1]}, K=8)
    with pytest.raises(Exception, match="K must be a positive multiple of 4, got 6"):
        call("Int6Rows", {"ids": ids} | table, K=6)


def fused(body: str) -> Counter[str]:
    """Operators of a graph of x and r [B, T, 6] after the rules."""
    text = f"""<ir_version: 10, opset_import: ["": 21]>
      g (float[B, T, 6] x, float[B, T, 6] r, float[B, 1, 6] short) => (float[B, T, 6] y)
      <float[6] weight = {{1, 2, 3, 4, 5, 6}}, float epsilon = {{0.5}}, float two = {{2}}, int64[1] axis = {{-1}}>
      {{ {body} }}"""
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(parser.parse_model(text)))
    fuse_layers(model)
    for function in model.functions.values():
        assert function.name in {node.op_type for node in model.graph}
    feed = {name: np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32) for name in ("x", "r")}
    feed["short"] = feed["x"][:, :1]
    after = ir.serde.serialize_model(model).SerializeToString()
    before = parser.parse_model(text).SerializeToString()
    one, other = (ort.InferenceSession(proto, providers=["CPUExecutionProvider"]) for proto in (before, after))
    known = {item.name for item in other.get_inputs()}
    given = {name: value for name, value in feed.items() if name in known}
    np.testing.assert_allclose(one.run(None, feed)[0], other.run(None, given)[0], rtol=2e-6)
    return Counter(node.op_type for node in model.graph)


NORM = """
  square = Pow ({x}, two)
  mean = ReduceMean <keepdims = 1> (square, {axis})
  shifted = Add (mean, epsilon)
  root = Sqrt (shifted)
  unit = Div ({x}, root)
  scaled = Mul ({scaled})
  y = Neg (scaled)"""


def test_a_norm_takes_the_sum_before_it() -> None:
    assert fused(NORM.format(x="x", axis="axis", scaled="weight, unit")) == {"RmsNorm": 1, "Neg": 1}
    summed = "total = Add (x, r)" + NORM.format(x="total", axis="axis", scaled="unit, weight")
    assert fused(summed) == {"AddRmsNorm": 1, "Neg": 1}
    also_read = summed.replace("y = Neg (scaled)", "y = Add (scaled, total)")
    assert fused(also_read) == {"AddRmsNorm": 1, "Add": 1}
    broadcast = "total = Add (x, short)" + NORM.format(x="total", axis="axis", scaled="unit, weight")
    assert fused(broadcast) == {"Add": 1, "RmsNorm": 1, "Neg": 1}


def test_what_only_looks_like_a_norm_stays() -> None:
    other_axis = "one = Constant <value_ints = [1]> ()" + NORM.format(x="x", axis="one", scaled="weight, unit")
    assert "RmsNorm" not in fused(other_axis)
    computed = NORM.format(x="x", axis="axis", scaled="r, unit")
    assert "RmsNorm" not in fused(computed)
    cubed = NORM.format(x="x", axis="axis", scaled="weight, unit").replace("Pow (x, two)", "Pow (x, epsilon)")
    assert "RmsNorm" not in fused(
        cubed.replace("square = Pow (x, epsilon)", "size = Abs (x) square = Pow (size, epsilon)")
    )
