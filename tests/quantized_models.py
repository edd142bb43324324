"""ONNX models of one quantized linear layer, as the lowering finds and leaves them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

import lincompile.kernels.ops  # noqa: F401
from lincompile.kernels.int6_linear.codes import quantize_weight
from lincompile.kernels.int6_linear.pack import pack
from lincompile.lowering.onnx.functions import attach_bodies
from lincompile.lowering.onnx.quantized import lower_quantized

ops = torch.ops.lincompile


def weights(rows: int, columns: int, bits: int, group: int = 128) -> dict[str, Tensor]:
    torch.manual_seed(rows * 7 + columns)
    codes, scale = quantize_weight(torch.randn(rows, columns) / columns**0.5, group, bits)
    if bits == 8:
        return {"fc.weight": codes, "fc.weight_scale": scale}
    hi, lo = pack(codes, group)
    return {"fc.weight_hi": hi, "fc.weight_lo": lo, "fc.weight_scale": scale}


def placeholder_model(
    tensors: dict[str, Tensor], columns: int, rows: int, activation: str, bias: Tensor | None = None, group: int = 128
) -> ir.Model:
    """What translation leaves: one placeholder node over initializers, x [B, T, K] → y [B, T, N]."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "T", columns]))
    given = dict(tensors) if bias is None else {**tensors, "fc.bias": bias}
    values = [
        ir.Value(name=name, const_value=ir.tensor(tensor.numpy(), name=name), shape=ir.Shape(tensor.shape))
        for name, tensor in given.items()
    ]
    for value in values:
        value.type = ir.TensorType(value.const_value.dtype)
    if bias is None:
        values.append(None)
    name = "Int6Linear" if len(tensors) == 3 else "Int8Linear"
    node = ir.node(name, [x, *values], {"group_size": group, "activation": activation}, domain="lincompile")
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    node.outputs[0].shape = ir.Shape(["B", "T", rows])
    initializers = [value for value in values if value is not None]
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def lowered(model: ir.Model, layout: str = "planes") -> onnx.ModelProto:
    import onnx_ir.passes.common as common

    lower_quantized(model, layout)
    common.RemoveUnusedNodesPass()(model)
    assert attach_bodies(model) == []
    common.NameFixPass()(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    return proto


def expected(tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None, activation: str, group: int = 128) -> Tensor:
    op = ops.int6_linear if len(tensors) == 3 else ops.int8_linear
    return op(x, *tensors.values(), bias, group, activation)
