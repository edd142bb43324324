"""Six-bit embeddings: the table, and a head tied to it, as GatherBlockQuantized and MatMulNBits.

Where the program packs its embedding (``Quantize(embeddings=True)``) the file holds its codes. Where it doesn't, an
option of the export rounds the table here, which changes the model a little (as any rounding of weights does). One copy
of the planes serves the look-up and the head.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...kernels.int6_linear.codes import dequantize, quantize_weight
from ...kernels.int6_linear.pack import unpack
from ...passes.errors import LincompileError
from .quantized import (
    Emitter,
    Matrix,
    QuantizedReport,
    constant_tensor,
    matmul,
    stored_planes,
    unsigned,
    widen_plane,
    zero_points,
)
from .schemas import CONTRIB_DOMAIN, PLACEHOLDER_DOMAIN

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
    blocks = -(-columns // GROUP_SIZE)
    emit = Emitter(graph, graph[0])
    stored = stored_planes(emit, f"{table.name}.", unsigned(codes), scale.numpy())
    parts = _parts(emit, stored, rows, blocks)
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
        native = stored if report.native and activation == "a8" else None
        matrix = Matrix(rows, columns, tuple(products), native)
        for head in heads:
            _replace_head(graph, head, matrix, activation)
            report.native += native is not None
    for node in lookups:
        _replace_lookup(graph, node, node.inputs[1], parts)
    report.linears += len(heads)
    report.weights += rows * columns
    if heads:
        report.activations[activation] = report.activations.get(activation, 0) + len(heads)
    own = getattr(table.const_value, "raw", None)
    return own if isinstance(own, Tensor) else weight, dequantize(codes, scale)


def lower_packed_embeddings(model: ir.Model, report: QuantizedReport) -> bool:
    """Replace the placeholder of every look-up in a packed table, in place; must come before the linears'.

    Returns:
        Whether there was one.

    Raises:
        LincompileError: groups other than 128, or a width that isn't a multiple of 4.
    """
    graph = model.graph
    heads = {node.inputs[1] for node in graph if node.op_type == "Int6Linear" and node.domain == PLACEHOLDER_DOMAIN}
    looked_up: set[ir.Value | None] = set()
    for node in [n for n in graph if n.op_type == "Int6Embedding" and n.domain == PLACEHOLDER_DOMAIN]:
        ids, high = node.inputs[0], node.inputs[1]
        columns, group_size = node.attributes["in_features"].as_int(), node.attributes["group_size"].as_int()
        name = "" if high is None else str(high.name)
        if group_size != GROUP_SIZE or columns % 4:
            raise LincompileError(
                f"the packed embedding '{name}' can't be exported: groups of {group_size} and a width of {columns}; "
                f"ONNX takes groups of {GROUP_SIZE} and widths that are multiples of 4"
            )
        hi, lo, scale = (constant_tensor(node, index) for index in (1, 2, 3))
        emit = Emitter(graph, node)
        codes = unsigned(unpack(hi, lo, columns, group_size))
        stored = stored_planes(emit, name.removesuffix("weight_hi"), codes, scale.numpy())
        parts = _parts(emit, stored, hi.shape[0], scale.shape[1])
        _replace_lookup(graph, node, ids, parts)
        if high not in heads | looked_up:
            report.weights += hi.shape[0] * columns
        looked_up.add(high)
    return bool(looked_up)


def _parts(
    emit: Emitter, stored: tuple[ir.Value, ir.Value, ir.Value], rows: int, blocks: int
) -> list[tuple[int, ir.Value, ir.Value, ir.Value]]:
    """The planes as ``(bits, plane, scales, zero points)``, whose values add up to the weights."""
    scales = emit("Cast", stored[2], to=ir.DataType.FLOAT.value)
    four = emit("Mul", scales, emit.constant(4.0, np.float32))
    return [
        (bits, plane, factor, zero_points(emit, rows, blocks, bits, zero))
        for plane, bits, factor, zero in zip(stored[:2], (4, 2), (four, scales), (8, 0), strict=True)
    ]


def _replace_lookup(
    graph: ir.Graph, node: ir.Node, ids: ir.Value | None, parts: list[tuple[int, ir.Value, ir.Value, ir.Value]]
) -> None:
    emit = Emitter(graph, node)
    attributes = {"block_size": GROUP_SIZE, "gather_axis": 0, "quantize_axis": 1}
    read = [
        emit("GatherBlockQuantized", plane, ids, scales, zeros, domain=CONTRIB_DOMAIN, bits=bits, **attributes)
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
