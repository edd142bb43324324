"""Quantized linear layers on stock kernels: six exact bits out of MatMulNBits, which knows 2, 4 and 8.

A six-bit code is ``c = 4·hi + lo − 32`` with ``hi`` in four bits and ``lo`` in two, so with block scales s::

    x·Wᵀ = MatMulNBits₄(x, hi; scale 4s, zero point 8) + MatMulNBits₂(x, lo; scale s, zero point 0)

Both factors of four are exact in floating point, and at ``accuracy_level`` 4 the kernels quantize activations to int8
per block exactly as ``activation="a8"`` does, so the result differs from the torch op by summation order only.

What the file stores is the codes at six bits (no padding in a partial last block) and one float16 scale per block; the
padding, the factor 4, the zero points and, for the ``int8`` layout, the joining of the planes are standard operators on
constants, which onnxruntime folds when it loads the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...kernels.int6_linear.pack import unpack
from ...passes.errors import LincompileError
from . import native
from .schemas import CONTRIB_DOMAIN, PLACEHOLDER_DOMAIN

LAYOUTS = ("planes", "int8", "native")
_INT8_LEVEL = 4  # MatMulNBits' accuracy_level: activations in int8 per block
_FLOAT_LEVEL = 1  # activations stay float32
_OFFSET = 32  # of the unsigned six-bit code
_CONSTANT_PREFIX = "lincompile"
_PLACEHOLDERS = ("Int6Linear", "Int8Linear")


@dataclass
class QuantizedReport:
    """What was lowered: how many linears, their weights and activations, how many call a native operator."""

    linears: int = 0
    weights: int = 0
    activations: dict[str, int] = field(default_factory=dict)
    native: int = 0


@dataclass(frozen=True)
class Matrix:
    """One quantized matrix ``[N, K]`` as MatMulNBits inputs: ``(bits, B, scales, zero_points)`` per product.

    Or, for the native operator, as its inputs ``(high, low, scale)``.
    """

    rows: int
    columns: int
    products: tuple[tuple[int, ir.Value, ir.Value, ir.Value], ...]
    native: tuple[ir.Value, ir.Value, ir.Value] | None = None


class Emitter:
    """Adds nodes before one node of a graph, and initializers to the graph (each constant once)."""

    def __init__(self, graph: ir.Graph, before: ir.Node):
        self.graph, self.before = graph, before

    def __call__(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, domain=domain)
        self.place(node)
        return node.outputs[0]

    def split(self, value: ir.Value, sizes: list[int], axis: int) -> tuple[ir.Value, ...]:
        """Parts of these sizes."""
        node = ir.node("Split", [value, self.constant(sizes)], {"axis": axis}, num_outputs=len(sizes))
        self.place(node)
        return tuple(node.outputs)

    def place(self, node: ir.Node) -> None:
        self.graph.insert_before(self.before, node)

    def weight(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        array = np.asarray(values, dtype=dtype)
        name = f"{_CONSTANT_PREFIX}.{array.dtype}.{list(array.shape)}.{array.ravel().tolist()}"
        existing = self.graph.initializers.get(name)
        return existing if existing is not None else self.weight(name, array)


def lower_quantized(model: ir.Model, layout: str = "planes", report: QuantizedReport | None = None) -> QuantizedReport:
    """Replace every placeholder of a quantized linear by MatMulNBits nodes, in place.

    Args:
        layout: ``planes`` keeps six bits in memory too (4 + 2 products); ``int8`` joins the planes to eight bits when
            the model is loaded, six on disk: one product, faster, a third more memory; ``native`` calls an operator of
            the native library, whose body in the file is ``planes`` (:mod:`.native`; groups of 128). Layers whose
            activations aren't ``a8`` (six-bit or float activations) need float products, for which only the four-bit
            kernel is fast: their two bits are widened to four when loaded, in every layout.
        report: what was lowered before, to be added to.

    Raises:
        LincompileError: an unknown layout, a group size that isn't a power of two, weights that aren't constants.
    """
    if layout not in LAYOUTS:
        raise LincompileError(f"unknown int6 layout '{layout}' (choose from: {', '.join(LAYOUTS)})")
    graph, report = model.graph, report or QuantizedReport()
    packed: dict[tuple[Any, ...], Matrix] = {}
    for node in [n for n in graph if n.domain == PLACEHOLDER_DOMAIN and n.op_type in _PLACEHOLDERS]:
        group_size, activation = node.attributes["group_size"].as_int(), node.attributes["activation"].as_string()
        if group_size < 16 or group_size & (group_size - 1):
            raise LincompileError(
                f"{_where(node)}: onnxruntime's MatMulNBits needs groups of a power of two (16 or more), got "
                f"{group_size}; quantize with groups of 128"
            )
        weight_inputs = node.inputs[1:4] if node.op_type == "Int6Linear" else node.inputs[1:3]
        key = (*(value.name for value in weight_inputs if value is not None), activation == "a8")
        emit = Emitter(graph, node)
        if key not in packed:
            pack = _pack_int6 if node.op_type == "Int6Linear" else _pack_int8
            packed[key] = pack(emit, node, group_size, activation, layout)
            report.weights += packed[key].rows * packed[key].columns
        _replace(emit, node, packed[key], group_size, activation)
        report.linears += 1
        report.activations[activation] = report.activations.get(activation, 0) + 1
        report.native += packed[key].native is not None
    if report.native:
        native.attach_int6_linear(model)
    return report


def _where(node: ir.Node) -> str:
    weight = node.inputs[1]
    return f"the quantized linear of '{weight.name if weight is not None else node.name}'"


def constant_tensor(node: ir.Node, index: int) -> torch.Tensor:
    """A stored input of a placeholder node.

    Raises:
        LincompileError: it isn't stored.
    """
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise LincompileError(f"{_where(node)}: its weights are computed by the graph; they must be stored buffers")
    return torch.from_numpy(np.array(value.const_value.numpy()))


def _sizes(node: ir.Node, rows: int) -> tuple[int, int]:
    x = node.inputs[0]
    columns = x.shape[-1] if x is not None and x.shape is not None else None
    if not isinstance(columns, int):
        raise LincompileError(f"{_where(node)}: the number of input features isn't a fixed size")
    return rows, columns


def unsigned(codes: torch.Tensor) -> np.ndarray[Any, Any]:
    """Six-bit codes in [−32, 31] as bytes in [0, 63]."""
    return (codes.numpy().astype(np.int16) + _OFFSET).astype(np.uint8)


def plane_of_codes(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Codes ``[N, K]`` → bytes ``[N, ceil(K·bits/8)]``, low bits first: the order of MatMulNBits' blobs."""
    rows, columns = codes.shape
    per_byte = 8 // bits
    padded = np.zeros((rows, -(-columns // per_byte), per_byte), np.uint8)
    padded.reshape(rows, -1)[:, :columns] = codes
    plane = np.zeros(padded.shape[:2], np.uint8)
    for index in range(per_byte):
        plane |= padded[..., index] << (bits * index)
    return plane


def _full_width(emit: Emitter, plane: ir.Value, missing: int) -> ir.Value:
    """Zero bytes after the last partial block (a constant when loaded; not stored)."""
    return emit("Pad", plane, emit.constant([0, 0, 0, missing])) if missing else plane


def zero_points(emit: Emitter, rows: int, blocks: int, bits: int, zero: int) -> ir.Value:
    """The zero point of every block, packed as MatMulNBits wants them (a constant when loaded; not stored)."""
    fill = sum(zero << shift for shift in range(0, 8, bits))
    shape = emit.constant([rows, -(-blocks * bits // 8)])
    return emit("ConstantOfShape", shape, value=ir.tensor(np.array([fill], np.uint8)))


def _pack_int6(emit: Emitter, node: ir.Node, group_size: int, activation: str, layout: str) -> Matrix:
    hi, lo, scale = (constant_tensor(node, index) for index in (1, 2, 3))
    rows, columns = _sizes(node, hi.shape[0])
    codes = unsigned(unpack(hi, lo, columns, group_size))
    name = str(node.inputs[1].name).removesuffix("weight_hi") if node.inputs[1] is not None else ""
    blocks = -(-columns // group_size)
    padded = blocks * group_size
    hi_stored, lo_stored, scale_stored = stored_planes(emit, name, codes, scale.numpy())
    if layout == "native" and activation == "a8" and group_size == native.GROUP_SIZE:
        return Matrix(rows, columns, (), (hi_stored, lo_stored, scale_stored))
    hi_plane = _full_width(emit, hi_stored, padded // 2 - (columns + 1) // 2)
    lo_plane = _full_width(emit, lo_stored, padded // 4 - (columns + 3) // 4)
    scales = emit("Cast", scale_stored, to=ir.DataType.FLOAT.value)
    if layout == "int8" and activation == "a8":
        blobs = _blobs(emit, _join_planes(emit, hi_plane, lo_plane), rows, blocks)
        zero = zero_points(emit, rows, blocks, 8, _OFFSET)
        return Matrix(rows, columns, ((8, blobs, scales, zero),))
    four = emit("Mul", scales, emit.constant(4.0, np.float32))
    low_bits = 2
    if activation != "a8":
        lo_plane, low_bits = widen_plane(emit, lo_plane), 4
    return Matrix(
        rows,
        columns,
        (
            (4, _blobs(emit, hi_plane, rows, blocks), four, zero_points(emit, rows, blocks, 4, 8)),
            (low_bits, _blobs(emit, lo_plane, rows, blocks), scales, zero_points(emit, rows, blocks, low_bits, 0)),
        ),
    )


def stored_planes(
    emit: Emitter, name: str, codes: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Unsigned six-bit codes and their scales as initializers, those of an earlier call where names are the same."""
    known = [emit.graph.initializers.get(f"{name}onnx_{part}") for part in ("hi", "lo", "scale")]
    if known[0] is not None and known[1] is not None and known[2] is not None:
        return known[0], known[1], known[2]
    return (
        emit.weight(f"{name}onnx_hi", plane_of_codes(codes >> 2, 4)),
        emit.weight(f"{name}onnx_lo", plane_of_codes(codes & 3, 2)),
        emit.weight(f"{name}onnx_scale", scale),
    )


def _pack_int8(emit: Emitter, node: ir.Node, group_size: int, activation: str, layout: str) -> Matrix:
    weight, scale = constant_tensor(node, 1), constant_tensor(node, 2)
    rows, columns = _sizes(node, weight.shape[0])
    name = str(node.inputs[1].name).removesuffix("weight") if node.inputs[1] is not None else ""
    blocks = -(-columns // group_size)
    missing = blocks * group_size - columns
    codes = (weight.numpy().astype(np.int16) + 128).astype(np.uint8)
    scales = emit("Cast", emit.weight(f"{name}onnx_scale", scale.numpy()), to=ir.DataType.FLOAT.value)
    if activation == "a8":
        plane = _full_width(emit, emit.weight(f"{name}onnx_codes", codes), missing)
        zero = zero_points(emit, rows, blocks, 8, 128)
        return Matrix(rows, columns, ((8, _blobs(emit, plane, rows, blocks), scales, zero),))
    # Float activations: only the four-bit kernel is fast, so two nibble planes, 16·hi + lo − 128.
    missing = blocks * group_size // 2 - (columns + 1) // 2
    high = _full_width(emit, emit.weight(f"{name}onnx_hi", plane_of_codes(codes >> 4, 4)), missing)
    low = _full_width(emit, emit.weight(f"{name}onnx_lo", plane_of_codes(codes & 15, 4)), missing)
    sixteen = emit("Mul", scales, emit.constant(16.0, np.float32))
    return Matrix(
        rows,
        columns,
        (
            (4, _blobs(emit, high, rows, blocks), sixteen, zero_points(emit, rows, blocks, 4, 8)),
            (4, _blobs(emit, low, rows, blocks), scales, zero_points(emit, rows, blocks, 4, 0)),
        ),
    )


def _blobs(emit: Emitter, plane: ir.Value, rows: int, blocks: int) -> ir.Value:
    return emit("Reshape", plane, emit.constant([rows, blocks, -1]))


def _bytes(emit: Emitter, *values: int) -> ir.Value:
    return emit.constant(list(values) if len(values) > 1 else values[0], np.uint8)


def _spread(emit: Emitter, plane: ir.Value, bits: int) -> ir.Value:
    """Packed bytes ``[N, M]`` → one code per byte ``[N, M·8/bits]``."""
    shifts = _bytes(emit, *range(0, 8, bits))
    shifted = emit("BitShift", emit("Unsqueeze", plane, emit.constant([-1])), shifts, direction="RIGHT")
    return emit("Reshape", emit("BitwiseAnd", shifted, _bytes(emit, (1 << bits) - 1)), emit.constant([0, -1]))


def _join_planes(emit: Emitter, hi_plane: ir.Value, lo_plane: ir.Value) -> ir.Value:
    """The two planes → unsigned six-bit codes, one a byte."""
    high = emit("BitShift", _spread(emit, hi_plane, 4), _bytes(emit, 2), direction="LEFT")
    return emit("BitwiseOr", high, _spread(emit, lo_plane, 2))


def widen_plane(emit: Emitter, lo_plane: ir.Value) -> ir.Value:
    """A two-bit plane ``[N, M]`` → the same codes in nibbles ``[N, 2M]``."""
    # A byte holds c0 | c1 << 2 | c2 << 4 | c3 << 6; its two nibbles become the bytes c0 | c1 << 4 and c2 | c3 << 4.
    nibbles = _spread(emit, lo_plane, 4)
    first = emit("BitwiseAnd", nibbles, _bytes(emit, 3))
    second = emit("BitShift", emit("BitwiseAnd", nibbles, _bytes(emit, 12)), _bytes(emit, 2), direction="LEFT")
    return emit("BitwiseOr", first, second)


def matmul(emit: Emitter, x: ir.Value, matrix: Matrix, group_size: int, activation: str) -> ir.Value:
    """``x · Wᵀ``: the sum of the matrix's products, or the native operator."""
    if matrix.native is not None:
        return emit(native.INT6_LINEAR, x, *matrix.native, domain=PLACEHOLDER_DOMAIN, K=matrix.columns, N=matrix.rows)
    total = None
    for bits, blobs, scales, zeros in matrix.products:
        product = emit(
            "MatMulNBits",
            x,
            blobs,
            scales,
            zeros,
            domain=CONTRIB_DOMAIN,
            K=matrix.columns,
            N=matrix.rows,
            bits=bits,
            block_size=group_size,
            accuracy_level=_INT8_LEVEL if activation == "a8" else _FLOAT_LEVEL,
        )
        total = product if total is None else emit("Add", total, product)
    assert total is not None
    return total


def _replace(emit: Emitter, node: ir.Node, packed: Matrix, group_size: int, activation: str) -> None:
    x, bias = node.inputs[0], node.inputs[-1]
    has_bias = len(node.inputs) == (5 if node.op_type == "Int6Linear" else 4) and bias is not None
    assert x is not None
    if activation == "a6":
        x = _six_bit_activations(emit, x, packed.columns, group_size)
    total = matmul(emit, x, packed, group_size, activation)
    if has_bias:
        total = emit("Add", total, bias)
    old = node.outputs[0]
    total.name, total.shape, total.type = old.name, old.shape, old.type
    old.name = None
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    emit.graph.remove(node, safe=True)


def _six_bit_activations(emit: Emitter, x: ir.Value, columns: int, group_size: int) -> ir.Value:
    """What x becomes in six bits per token and group: ``fake_quantize_activation(x, group_size, "a6")``."""
    assert x.shape is not None
    rank, groups = len(x.shape), -(-columns // group_size)
    missing = groups * group_size - columns
    padded = emit("Pad", x, emit.constant([0] * (2 * rank - 1) + [missing])) if missing else x
    split = emit("Reshape", padded, emit.constant([0] * (rank - 1) + [groups, group_size]))
    largest = emit("ReduceMax", emit("Abs", split), emit.constant([-1]), keepdims=1)
    scale = emit("Div", largest, emit.constant(31.0, np.float32))
    empty = emit("Equal", scale, emit.constant(0.0, np.float32))
    safe = emit("Where", empty, emit.constant(1.0, np.float32), scale)
    codes = emit("Round", emit("Div", split, safe))
    limits = emit.constant(-32.0, np.float32), emit.constant(31.0, np.float32)
    values = emit("Mul", emit("Clip", codes, *limits), scale)
    flat = emit("Reshape", values, emit.constant([0] * (rank - 1) + [groups * group_size]))
    if not missing:
        return flat
    return emit("Slice", flat, emit.constant([0]), emit.constant([columns]), emit.constant([-1]))
