"""Operators of the native library (:mod:`lincompile.lowering.native`) in a file, each with a body of stock operators.

A session that has registered the library runs its kernels; onnxruntime without it, and any other runtime, finds the
function of the same name in the file and runs that. For ``lincompile.Int6LinearA8`` these are the two products of the
``planes`` layout, whose constants fold when the file is loaded, for ``lincompile.GatedLinearAttention`` the contrib
operator: nothing is slower or larger for having asked.
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
