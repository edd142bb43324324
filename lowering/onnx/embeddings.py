"""Six-bit embeddings on request: the table, and a head tied to it, as GatherBlockQuantized and MatMulNBits.

The program itself leaves embeddings alone, so this changes the model a little (as any rounding of weights does): it is
an option of the export, off by default. One copy of the planes serves the look-up and the head.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...kernels.int6_linear.codes import dequantize, quantize_weight
from ...passes.errors import LincompileError
from .quantized import Emitter, Matrix, QuantizedReport, matmul, plane_of_codes, widen_plane, zero_points
from .schemas import CONTRIB_DOMAIN

GROUP_SIZE = 128


def lower_embeddings(model: ir.Model, tokens: ir.Value, report: QuantizedReport) -> tuple[Tensor, Tensor]:
    """Quantize the table that ``tokens`` index, and the head where it is the same table, in place.

    Returns:
        The table (the module's own tensor where the graph still refers to it) and what it was rounded to.

    Raises:
        LincompileError: no look-up of a stored table by the tokens, a width that isn't a multiple of 4, or weights that
            six bits can't hold (NaN, or a row too small for float16 scales).
    """
    graph = model.graph
    lookups = [n for n in graph if n.op_type == "Gather" and n.domain == "" and n.inputs[1] is tokens]
    table = lookups[0].inputs[0] if lookups else None
    if table is None or table.const_value is None or len(table.const_value.shape) != 2:
        raise LincompileError("the embedding can't be quantized: the tokens don't index one stored table")
    rows, columns = (int(size) for size in table.const_value.shape)
    if columns % 4:
        raise LincompileError(
            f"the embedding '{table.name}' can't be quantized: its width {columns} isn't a multiple of 4"
        )
    weight = torch.from_numpy(np.array(table.const_value.numpy()))
    try:
        codes, scale = quantize_weight(weight, GROUP_SIZE)
    except ValueError as error:
        raise LincompileError(f"the embedding '{table.name}' can't be quantized: {error}") from error
    unsigned = (codes.numpy().astype(np.int16) + 32).astype(np.uint8)
    blocks = -(-columns // GROUP_SIZE)
    emit = Emitter(graph, graph[0])
    planes = [
        emit.weight(f"{table.name}.onnx_hi", plane_of_codes(unsigned >> 2, 4)),
        emit.weight(f"{table.name}.onnx_lo", plane_of_codes(unsigned & 3, 2)),
    ]
    scale_stored = emit.weight(f"{table.name}.onnx_scale", scale.numpy())
    scales = emit("Cast", scale_stored, to=ir.DataType.FLOAT.value)
    four = emit("Mul", scales, emit.constant(4.0, np.float32))
    parts = []
    for plane, bits, factor, zero in zip(planes, (4, 2), (four, scales), (8, 0), strict=True):
        parts.append((bits, plane, factor, zero_points(emit, rows, blocks, bits, zero)))
    heads = _heads_of(graph, table)
    # The head rounds its activations where the layers before it do.
    activation = "a8" if report.activations.get("a8") else "a16"
    if heads:
        missing = blocks * GROUP_SIZE - columns
        products = []
        for bits, plane, factor, zeros in parts:
            full = emit("Pad", plane, emit.constant([0, 0, 0, missing * bits // 8])) if missing else plane
            if bits == 2 and activation != "a8":
                bits, full, zeros = 4, widen_plane(emit, full), zero_points(emit, rows, blocks, 4, 0)
            products.append((bits, emit("Reshape", full, emit.constant([rows, blocks, -1])), factor, zeros))
        native = (planes[0], planes[1], scale_stored) if report.native and activation == "a8" else None
        matrix = Matrix(rows, columns, tuple(products), native)
        for head in heads:
            _replace_head(graph, head, matrix, activation)
            report.native += native is not None
    for node in lookups:
        _replace_lookup(graph, node, parts)
    report.linears += len(heads)
    report.weights += rows * columns
    if heads:
        report.activations[activation] = report.activations.get(activation, 0) + len(heads)
    own = getattr(table.const_value, "raw", None)
    return own if isinstance(own, Tensor) else weight, dequantize(codes, scale)


def _replace_lookup(graph: ir.Graph, node: ir.Node, parts: list[tuple[int, ir.Value, ir.Value, ir.Value]]) -> None:
    emit = Emitter(graph, node)
    attributes = {"block_size": GROUP_SIZE, "gather_axis": 0, "quantize_axis": 1}
    read = [
        emit(
            "GatherBlockQuantized", plane, node.inputs[1], scales, zeros, domain=CONTRIB_DOMAIN, bits=bits, **attributes
        )
        for bits, plane, scales, zeros in parts
    ]
    _put(graph, node, emit("Add", *read))


def _heads_of(graph: ir.Graph, table: ir.Value) -> list[ir.Node]:
    """The products ``x · tableᵀ``."""
    found = []
    for node in graph:
        right = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
        turned = right.producer() if right is not None else None
        if turned is not None and turned.op_type == "Transpose" and turned.inputs[0] is table:
            found.append(node)
    return found


def _replace_head(graph: ir.Graph, node: ir.Node, matrix: Matrix, activation: str) -> None:
    emit = Emitter(graph, node)
    x = node.inputs[0]
    assert x is not None
    _put(graph, node, matmul(emit, x, matrix, GROUP_SIZE, activation))


def _put(graph: ir.Graph, node: ir.Node, new: ir.Value) -> None:
    old = node.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.name = None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
