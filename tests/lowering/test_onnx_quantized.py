"""Six- and eight-bit linears on MatMulNBits: exact weights, the op's own activation rounding, six bits on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from quantized_models import expected, lowered, ops, placeholder_model, weights  # noqa: E402

from lincompile.kernels.int6_linear.codes import quantize_weight  # noqa: E402
from lincompile.kernels.int6_linear.pack import pack  # noqa: E402
from lincompile.lowering.onnx.functions import attach_bodies  # noqa: E402
from lincompile.lowering.onnx.native import attach_int6_linear  # noqa: E402
from lincompile.lowering.onnx.quantized import lower_quantized  # noqa: E402
from lincompile.passes.errors import LincompileError  # noqa: E402


def run(proto: onnx.ModelProto, x: Tensor) -> Tensor:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


# 72 and 576 end in a partial group, 70 in one whose planes end inside a byte; 256 fills its groups.
@pytest.mark.parametrize("columns", [72, 70, 256, 576])
@pytest.mark.parametrize("activation", ["a8", "a6", "a16"])
@pytest.mark.parametrize(("bits", "layout"), [(6, "planes"), (6, "int8"), (6, "native"), (8, "planes")])
def test_equals_the_torch_op(columns: int, activation: str, bits: int, layout: str) -> None:
    rows = 40
    tensors = weights(rows, columns, bits)
    bias = torch.randn(rows)
    proto = lowered(placeholder_model(tensors, columns, rows, activation, bias), layout)
    for shape in ((1, 1), (2, 7)):
        x = torch.randn(*shape, columns)
        torch.testing.assert_close(run(proto, x), expected(tensors, x, bias, activation), atol=5e-6, rtol=1e-5)


def test_weights_are_exact() -> None:
    """An identity matrix as input reads every weight back, bit for bit (a16: no rounding of activations)."""
    columns, rows = 200, 24
    tensors = weights(rows, columns, 6)
    eye = torch.eye(columns)[None]
    read = run(lowered(placeholder_model(tensors, columns, rows, "a16")), eye)[0].T
    assert torch.equal(read, expected(tensors, eye, None, "a16")[0].T)
    # With a8 an identity row quantizes to 127 · (1/127): exact up to the rounding of that scale and of one sum.
    for layout in ("planes", "int8", "native"):
        read8 = run(lowered(placeholder_model(tensors, columns, rows, "a8"), layout), eye)[0].T
        torch.testing.assert_close(read8, read, rtol=2e-7, atol=1e-7)


def test_all_zero_tokens_and_groups() -> None:
    tensors = weights(8, 256, 6)
    tensors["fc.weight_scale"][:, 1] = 0
    x = torch.randn(1, 3, 256)
    x[0, 1] = 0
    for activation in ("a8", "a6"):
        y = run(lowered(placeholder_model(tensors, 256, 8, activation)), x)
        assert torch.isfinite(y).all()
        assert torch.equal(y[0, 1], torch.zeros(8))
        torch.testing.assert_close(y, expected(tensors, x, None, activation), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("columns", [576, 1536])
def test_six_bits_on_disk(columns: int) -> None:
    rows = 64
    for layout in ("planes", "int8", "native"):
        model = placeholder_model(weights(rows, columns, 6), columns, rows, "a8")
        proto = lowered(model, layout)
        stored = sum(len(item.raw_data) for item in proto.graph.initializer)
        ideal = rows * (columns * 6 // 8 + 2 * -(-columns // 128))
        assert ideal <= stored <= ideal + 300  # a few shape constants


@pytest.mark.parametrize("activation", ["a8", "a6", "a16"])
@pytest.mark.parametrize("bits", [6, 8])
def test_the_portable_body_agrees(activation: str, bits: int) -> None:
    """onnx's ReferenceEvaluator has no MatMulNBits: it runs the function body."""
    from onnx.reference import ReferenceEvaluator

    tensors = weights(16, 200, bits)
    proto = lowered(placeholder_model(tensors, 200, 16, activation))
    assert [function.name for function in proto.functions] == ["MatMulNBits"]
    x = torch.randn(2, 5, 200)
    read = ReferenceEvaluator(proto).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(read, expected(tensors, x, None, activation).numpy(), atol=5e-6, rtol=1e-5)


def test_a_shared_matrix_is_stored_once() -> None:
    model = placeholder_model(weights(16, 256, 6), 256, 16, "a8")
    first = model.graph[0]
    again = ir.node("Int6Linear", list(first.inputs), dict(first.attributes), domain="lincompile")
    again.outputs[0].type, again.outputs[0].shape = first.outputs[0].type, first.outputs[0].shape
    model.graph.append(again)
    join = ir.node("Add", [first.outputs[0], again.outputs[0]])
    model.graph.append(join)
    model.graph.outputs[0] = join.outputs[0]
    report = lower_quantized(model)
    assert (report.linears, report.weights) == (2, 16 * 256)
    assert sum(name.endswith("onnx_hi") for name in model.graph.initializers) == 1


def test_refusals_say_what_and_where() -> None:
    model = placeholder_model(weights(8, 96, 6, 96), 96, 8, "a8", group=96)
    with pytest.raises(LincompileError, match=r"fc\.weight_hi.*power of two.*got 96"):
        lower_quantized(model)
    with pytest.raises(LincompileError, match="unknown int6 layout 'int5'"):
        lower_quantized(placeholder_model(weights(8, 128, 6), 128, 8, "a8"), "int5")


def embedding_model(table: Tensor) -> ir.Model:
    """ids [B, T] → the table's rows, and their products with the table (a tied head)."""
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B", "T"]))
    stored = ir.Value(name="embed.weight", const_value=ir.tensor(table.numpy(), name="embed.weight"))
    stored.shape, stored.type = ir.Shape(table.shape), ir.TensorType(ir.DataType.FLOAT)
    gather = ir.node("Gather", [stored, ids], {"axis": 0})
    turn = ir.node("Transpose", [stored], {"perm": [1, 0]})
    product = ir.node("MatMul", [gather.outputs[0], turn.outputs[0]])
    for node, name, width in ((gather, "rows", table.shape[1]), (product, "logits", table.shape[0])):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["B", "T", width])
    outputs = [gather.outputs[0], product.outputs[0]]
    graph = ir.Graph(
        [ids], outputs, nodes=[gather, turn, product], initializers=[stored], opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("activation", "native"), [("a8", 0), ("a16", 0), ("a8", 1)])
def test_embeddings_in_six_bits(activation: str, native: int) -> None:
    """The look-up reads the rounded table, the tied head multiplies with it; the planes are stored once.

    The head's activations are rounded where those of the layers before it are.
    """
    import onnx_ir.passes.common as common
    from onnx.reference import ReferenceEvaluator

    from lincompile.kernels.int6_linear.codes import dequantize
    from lincompile.lowering.onnx.embeddings import lower_embeddings
    from lincompile.lowering.onnx.quantized import QuantizedReport

    torch.manual_seed(0)
    table = torch.randn(50, 200)
    model, report = embedding_model(table), QuantizedReport(activations={activation: 1}, native=native)
    lower_embeddings(model, model.graph.inputs[0], report)
    assert report.activations == {activation: 2} and report.native == 2 * native
    if native:
        attach_int6_linear(model)
    common.RemoveUnusedNodesPass()(model)
    assert attach_bodies(model) == []
    common.NameFixPass()(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    assert (report.linears, report.weights) == (1, 50 * 200)
    stored = sum(len(item.raw_data) for item in proto.graph.initializer)
    assert stored < 50 * 200 * 0.8 + 400  # the float table is gone

    codes, scale = quantize_weight(table)
    ids = torch.tensor([[3, 49, 0], [7, 7, 12]])
    rows = dequantize(codes, scale)[ids]
    logits = ops.int6_linear(rows, *pack(codes), scale, None, 128, activation)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for read, product in (
        session.run(None, {"ids": ids.numpy()}),
        ReferenceEvaluator(proto).run(None, {"ids": ids.numpy()}),
    ):
        np.testing.assert_allclose(read, rows.numpy(), atol=1e-6)
        np.testing.assert_allclose(product, logits.numpy(), atol=1e-4)


def test_an_embedding_that_six_bits_cannot_hold_is_refused() -> None:
    from lincompile.lowering.onnx.embeddings import lower_embeddings
    from lincompile.lowering.onnx.quantized import QuantizedReport

    table = torch.randn(50, 200)
    table[4, 4] = float("nan")
    model = embedding_model(table)
    with pytest.raises(LincompileError, match=r"'embed.weight' can't be quantized: .*NaN.*row 4"):
        lower_embeddings(model, model.graph.inputs[0], QuantizedReport())
