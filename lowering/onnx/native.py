"""Operators of the native library (:mod:`lincompile.lowering.native`) in a file, each with a body of stock operators.

A session that has registered the library runs its kernels; onnxruntime without it, and any other runtime, finds the
function of the same name in the file and runs that. For ``lincompile.Int6LinearA8`` these are the two products of the
``planes`` layout, whose constants fold when the file is loaded, for ``lincompile.GatedLinearAttention`` the contrib
operator: nothing is slower or larger for having asked. :mod:`.lawcat` has the operator of a whole attention site.

An operator whose inputs, attributes or meaning change needs another name. The domain's version doesn't protect a newer
file from an older library: onnxruntime 1.32 gives a node to any kernel whose first version isn't above the file's.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import parser

from ..native.library import DOMAIN
from .functions import BODY_OPSET
from .schemas import CONTRIB_DOMAIN

INT6_LINEAR = "Int6LinearA8"
GATED_LINEAR_ATTENTION = "GatedLinearAttention"
INT6_ROWS = "Int6Rows"
RMS_NORM = "RmsNorm"
ADD_RMS_NORM = "AddRmsNorm"
SWIGLU = "SwiGlu"
GROUP_SIZE = 128  # the kernels' only one

# x [..., K], high [N, ceil(K/2)], low [N, ceil(K/4)] (codes in input order, low bits first), scale float16 [N, groups].
_INT6_LINEAR = f"""
{INT6_LINEAR} <K, N> (x, high, low, scale) => (y) {{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  rest = Constant <value_ints = [-1]> ()
  rows_0d = Constant <value_int: int = @N> ()
  rows = Unsqueeze (rows_0d, zero)
  groups = Shape <start = 1, end = 2> (scale)
  scales = Cast <to = 1> (scale)
  blob_shape = Concat <axis = 0> (rows, groups, rest)
  no_padding = Constant <value_ints = [0, 0, 0]> ()
  high_group = Constant <value_ints = [{GROUP_SIZE // 2}]> ()
  high_full = Mul (groups, high_group)
  high_bytes = Shape <start = 1, end = 2> (high)
  high_missing = Sub (high_full, high_bytes)
  high_padding = Concat <axis = 0> (no_padding, high_missing)
  high_padded = Pad (high, high_padding)
  high_blobs = Reshape (high_padded, blob_shape)
  four = Constant <value_float = 4.0> ()
  high_scales = Mul (scales, four)
  high_zero_sum = Add (groups, one)
  high_zero_bytes = Div (high_zero_sum, two)
  high_zero_shape = Concat <axis = 0> (rows, high_zero_bytes)
  high_zeros = ConstantOfShape <value = uint8[1] {{136}}> (high_zero_shape)
  high_product = {CONTRIB_DOMAIN}.MatMulNBits
    <K: int = @K, N: int = @N, bits = 4, block_size = {GROUP_SIZE}, accuracy_level = 4>
    (x, high_blobs, high_scales, high_zeros)
  low_group = Constant <value_ints = [{GROUP_SIZE // 4}]> ()
  low_full = Mul (groups, low_group)
  low_bytes = Shape <start = 1, end = 2> (low)
  low_missing = Sub (low_full, low_bytes)
  low_padding = Concat <axis = 0> (no_padding, low_missing)
  low_padded = Pad (low, low_padding)
  low_blobs = Reshape (low_padded, blob_shape)
  low_zero_sum = Add (groups, three)
  fourth = Constant <value_ints = [4]> ()
  low_zero_bytes = Div (low_zero_sum, fourth)
  low_zero_shape = Concat <axis = 0> (rows, low_zero_bytes)
  low_zeros = ConstantOfShape <value = uint8[1] {{0}}> (low_zero_shape)
  low_product = {CONTRIB_DOMAIN}.MatMulNBits
    <K: int = @K, N: int = @N, bits = 2, block_size = {GROUP_SIZE}, accuracy_level = 4>
    (x, low_blobs, scales, low_zeros)
  y = Add (high_product, low_product)
}}"""


# The contrib operator's inputs and shapes; update_rule is "gated".
_GATED_LINEAR_ATTENTION = f"""
{GATED_LINEAR_ATTENTION} <q_num_heads, kv_num_heads, scale> (query, key, value, past_state, decay)
=> (output, present_state) {{
  output, present_state = {CONTRIB_DOMAIN}.LinearAttention
    <update_rule = "gated", q_num_heads: int = @q_num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale>
    (query, key, value, past_state, decay)
}}"""


# A row of a quantized table for each id [B, T]: float [B, T, K], K a multiple of 4.
_INT6_ROWS = f"""
{INT6_ROWS} <K> (ids, high, low, scale) => (y) {{
  columns_0d = Constant <value_int: int = @K> ()
  zero = Constant <value_ints = [0]> ()
  last_axis = Constant <value_ints = [-1]> ()
  columns = Unsqueeze (columns_0d, zero)
  flat_shape = Constant <value_ints = [0, 0, -1]> ()
  high_bytes = Gather <axis = 0> (high, ids)
  high_column = Unsqueeze (high_bytes, last_axis)
  high_shifts = Constant <value = uint8[2] {{0, 4}}> ()
  high_shifted = BitShift <direction = "RIGHT"> (high_column, high_shifts)
  high_mask = Constant <value = uint8 {{15}}> ()
  high_codes = BitwiseAnd (high_shifted, high_mask)
  high_flat = Reshape (high_codes, flat_shape)
  low_bytes = Gather <axis = 0> (low, ids)
  low_column = Unsqueeze (low_bytes, last_axis)
  low_shifts = Constant <value = uint8[4] {{0, 2, 4, 6}}> ()
  low_shifted = BitShift <direction = "RIGHT"> (low_column, low_shifts)
  low_mask = Constant <value = uint8 {{3}}> ()
  low_codes = BitwiseAnd (low_shifted, low_mask)
  low_flat = Reshape (low_codes, flat_shape)
  two = Constant <value = uint8 {{2}}> ()
  upper = BitShift <direction = "LEFT"> (high_flat, two)
  codes = BitwiseOr (upper, low_flat)
  unsigned = Cast <to = 1> (codes)
  middle = Constant <value_float = 32.0> ()
  signed = Sub (unsigned, middle)
  group_scales = Gather <axis = 0> (scale, ids)
  group_column = Unsqueeze (group_scales, last_axis)
  repeats = Constant <value_ints = [1, 1, 1, {GROUP_SIZE}]> ()
  spread = Expand (group_column, repeats)
  spread_flat = Reshape (spread, flat_shape)
  used = Slice (spread_flat, zero, columns, last_axis)
  factors = Cast <to = 1> (used)
  y = Mul (signed, factors)
}}"""

_NORM = """
  power = Constant <value_float = 2.0> ()
  last_axis = Constant <value_ints = [-1]> ()
  floor = Constant <value_float: float = @epsilon> ()
  square = Pow ({x}, power)
  mean = ReduceMean <keepdims = 1> (square, last_axis)
  shifted = Add (mean, floor)
  root = Sqrt (shifted)
  unit = Div ({x}, root)
  y = Mul (unit, weight)
}}"""
_RMS_NORM = f"{RMS_NORM} <epsilon> (x, weight) => (y) {{{_NORM.format(x='x')}"
_ADD_RMS_NORM = (
    f"{ADD_RMS_NORM} <epsilon> (x, residual, weight) => (y, sum) {{\n  sum = Add (x, residual){_NORM.format(x='sum')}"
)

# silu of the first half of the last axis times the second.
_SWIGLU = f"""
{SWIGLU} (x) => (y) {{
  gate, up = Split <axis = -1, num_outputs = 2> (x)
  share = Sigmoid (gate)
  open = Mul (gate, share)
  y = Mul (open, up)
}}"""

_BODIES = {
    INT6_LINEAR: _INT6_LINEAR,
    GATED_LINEAR_ATTENTION: _GATED_LINEAR_ATTENTION,
    INT6_ROWS: _INT6_ROWS,
    RMS_NORM: _RMS_NORM,
    ADD_RMS_NORM: _ADD_RMS_NORM,
    SWIGLU: _SWIGLU,
}


def attach(model: ir.Model, *names: str) -> None:
    """Add the functions of operators, and their domain, to a model that calls them."""
    for name in names:
        _attach(model, _BODIES[name])


def attach_int6_linear(model: ir.Model) -> None:
    """Add the operator's function, and its domain, to a model that calls it."""
    _attach(model, _INT6_LINEAR)


def lower_attention(model: ir.Model) -> int:
    """Call the native operator wherever com.microsoft.LinearAttention has a decay and a past, in place; how many."""
    count = 0
    for node in model.graph:
        if node.domain != CONTRIB_DOMAIN or node.op_type != "LinearAttention":
            continue
        given = [value is not None for value in node.inputs]
        if node.attributes["update_rule"].as_string() != "gated" or given != [True] * 5:
            continue
        node.domain, node.op_type = DOMAIN, GATED_LINEAR_ATTENTION
        del node.attributes["update_rule"]
        count += 1
    if count:
        _attach(model, _GATED_LINEAR_ATTENTION)
    return count


def _attach(model: ir.Model, text: str) -> None:
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {BODY_OPSET}, "{CONTRIB_DOMAIN}" : 1]>'
    proto: onnx.FunctionProto = parser.parse_function(header + text)
    function = ir.serde.deserialize_function(proto)
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = 1
    model.graph.opset_imports[CONTRIB_DOMAIN] = 1
