"""Model-local functions with the names of the contrib operators, so that the file runs where those kernels are missing.

onnxruntime keeps its own kernel for a node whose domain and name it knows; every other runtime, and onnx's
``ReferenceEvaluator``, inlines the body. The bodies use standard operators of opset 21 and read every size from their
inputs, so that one body serves all layers. ONNX finds a function by name alone: where a model calls one operator in
two ways that need different bodies (update rules, convolution widths), none is attached and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import onnx
import onnx_ir as ir
from onnx import parser

from ...passes.errors import LincompileError
from .schemas import CONTRIB_DOMAIN

BODY_OPSET = 21
STANDARD_OPSET = 27  # the first with these operators
_STANDARD = ("LinearAttention", "CausalConvWithState")

# Time first for Scan; heads as [B, Hkv, group, ·] so that query heads broadcast over their state.
_LINEAR_ATTENTION = """
LinearAttention <q_num_heads, kv_num_heads, scale, update_rule>
({inputs}) => (output, present_state) {{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  factor = Constant <value_float: float = @scale> ()
  kv_heads = Shape <start = 1, end = 2> (past_state)
  key_size = Shape <start = 2, end = 3> (past_state)
  value_size = Shape <start = 3, end = 4> (past_state)
  query_shape = Concat <axis = 0> (zero, zero, kv_heads, rest, key_size)
  query_split = Reshape (query, query_shape)
  query_time = Transpose <perm = [1, 0, 2, 3, 4]> (query_split)
  key_shape = Concat <axis = 0> (zero, zero, kv_heads, key_size, one)
  key_split = Reshape (key, key_shape)
  key_time = Transpose <perm = [1, 0, 2, 3, 4]> (key_split)
  value_shape = Concat <axis = 0> (zero, zero, kv_heads, one, value_size)
  value_split = Reshape (value, value_shape)
  value_time = Transpose <perm = [1, 0, 2, 3, 4]> (value_split)
{prepare}
  present_state, o_time = Scan <num_scan_inputs = {scanned}, body = step
    (float[] state, float[] q_t, float[] k_t, float[] v_t{formals}) => (float[] new_state, float[] o_t) {{
{step}
      o_t = MatMul (q_t, new_state)
    }}> (past_state, query_time, key_time, value_time{actuals})
  o_batch = Transpose <perm = [1, 0, 2, 3, 4]> (o_time)
  o_scaled = Mul (o_batch, factor)
  output_shape = Constant <value_ints = [0, 0, -1]> ()
  output = Reshape (o_scaled, output_shape)
}}"""

_PREPARE_DECAY = """
  decay_shape = Concat <axis = 0> (zero, zero, kv_heads, rest, one)
  decay_split = Reshape (decay, decay_shape)
  decay_time = Transpose <perm = [1, 0, 2, 3, 4]> (decay_split)"""
_PREPARE_BETA = """
  beta_shape = Concat <axis = 0> (zero, zero, kv_heads, one, one)
  beta_split = Reshape (beta, beta_shape)
  beta_time = Transpose <perm = [1, 0, 2, 3, 4]> (beta_split)"""
_STEP_DECAY = """
      factor_t = Exp (g_t)
      decayed = Mul (state, factor_t)"""
_STEP_KEEP = """
      decayed = Identity (state)"""
_STEP_ADD = """
      update = Mul (k_t, v_t)
      new_state = Add (decayed, update)"""
_STEP_DELTA = """
      k_row = Transpose <perm = [0, 1, 3, 2]> (k_t)
      predicted = MatMul (k_row, decayed)
      surprise = Sub (v_t, predicted)
      weighted = Mul (b_t, surprise)
      update = Mul (k_t, weighted)
      new_state = Add (decayed, update)"""

_CAUSAL_CONV = """
CausalConvWithState <ndim, activation> (input, weight, bias, past_state) => (output, present_state) {{
  zero = Constant <value_ints = [0]> ()
  last = Constant <value_ints = [9223372036854775807]> ()
  time_axis = Constant <value_ints = [2]> ()
  time = Shape <start = 2, end = 3> (input)
  extended = Concat <axis = 2> (past_state, input)
  present_state = Slice (extended, time, last, time_axis)
{taps}
  output = Sum ({terms})
}}"""
_CONV_TAP = """
  at_{tap} = Constant <value_ints = [{tap}]> ()
  end_{tap} = Add (time, at_{tap})
  shifted_{tap} = Slice (extended, at_{tap}, end_{tap}, time_axis)
  tap_{tap} = Gather <axis = 2> (weight, at_{tap})
  column_{tap} = Squeeze (tap_{tap}, time_axis)
  term_{tap} = Mul (shifted_{tap}, column_{tap})"""

_GROUP_QUERY_ATTENTION = """
GroupQueryAttention <num_heads, kv_num_heads, scale, local_window_size, softcap>
(query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, position_ids,
 attention_bias, head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight, query_seqlens)
=> (output, present_key, present_value) {{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  group_axis = Constant <value_ints = [2]> ()
  factor = Constant <value_float: float = @scale> ()
  heads = Constant <value_int: int = @num_heads> ()
  window = Constant <value_int: int = @local_window_size> ()
  cap = Constant <value_float: float = @softcap> ()
  kv_heads = Shape <start = 1, end = 2> (past_key)
  size = Shape <start = 3, end = 4> (past_key)
  time = Shape <start = 1, end = 2> (query)
  batch = Shape <start = 0, end = 1> (query)
  cache_shape = Concat <axis = 0> (zero, zero, kv_heads, size)
  key_split = Reshape (key, cache_shape)
  key_new = Transpose <perm = [0, 2, 1, 3]> (key_split)
  present_key = Concat <axis = 2> (past_key, key_new)
  value_split = Reshape (value, cache_shape)
  value_new = Transpose <perm = [0, 2, 1, 3]> (value_split)
  present_value = Concat <axis = 2> (past_value, value_new)
  total = Shape <start = 2, end = 3> (present_key)
  query_shape = Concat <axis = 0> (zero, zero, kv_heads, rest, size)
  query_split = Reshape (query, query_shape)
  query_heads = Transpose <perm = [0, 2, 3, 1, 4]> (query_split)
  key_columns = Transpose <perm = [0, 1, 3, 2]> (present_key)
  key_group = Unsqueeze (key_columns, group_axis)
  raw = MatMul (query_heads, key_group)
  scores = Mul (raw, factor)
  float_zero = Constant <value_float = 0.0> ()
  float_one = Constant <value_float = 1.0> ()
  has_cap = Greater (cap, float_zero)
  safe_cap = Where (has_cap, cap, float_one)
  relative = Div (scores, safe_cap)
  bounded = Tanh (relative)
  restored = Mul (bounded, safe_cap)
  capped = Where (has_cap, restored, scores)
{bias}
  scalar_zero = Constant <value_int = 0> ()
  scalar_one = Constant <value_int = 1> ()
  time_scalar = Squeeze (time, zero)
  total_scalar = Squeeze (total, zero)
  past = Sub (total_scalar, time_scalar)
  row_range = Range (scalar_zero, time_scalar, scalar_one)
  rows = Add (row_range, past)
  columns = Range (scalar_zero, total_scalar, scalar_one)
  row_column = Unsqueeze (rows, one)
  distance = Sub (row_column, columns)
  causal = GreaterOrEqual (distance, scalar_zero)
  no_window = Less (window, scalar_zero)
  near = Less (distance, window)
  allowed = Or (no_window, near)
  visible = And (causal, allowed)
  hidden_score = Constant <value_float = -1e30> ()
  masked = Where (visible, biased, hidden_score)
  weights = Softmax <axis = -1> (masked)
  value_group = Unsqueeze (present_value, group_axis)
  mixed = MatMul (weights, value_group)
  ordered = Transpose <perm = [0, 3, 1, 2, 4]> (mixed)
  output_shape = Constant <value_ints = [0, 0, -1]> ()
  output = Reshape (ordered, output_shape)
}}"""
_ATTENTION_BIAS = """
  bias_group = Unsqueeze (attention_bias, group_axis)
  biased = Add (capped, bias_group)"""

# Weights as ((code − zero point) · scale), activations in eight bits per block when accuracy_level is 4 as the
# int8 kernels do. The blocks past K hold arbitrary codes: the activations are padded with zeros there.
_MATMUL_NBITS = """
MatMulNBits <K, N, bits, block_size, accuracy_level> (A, B, scales, zero_points) => (Y) {
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  last_axis = Constant <value_ints = [-1]> ()
  columns = Constant <value_int: int = @K> ()
  columns_1d = Unsqueeze (columns, zero)
  rows = Constant <value_int: int = @N> ()
  rows_1d = Unsqueeze (rows, zero)
  block = Constant <value_int: int = @block_size> ()
  block_1d = Unsqueeze (block, zero)
  width = Constant <value_int: int = @bits> ()
  level = Constant <value_int: int = @accuracy_level> ()
  blocks = Shape <start = 1, end = 2> (B)
  eight = Constant <value_int = 8> ()
  scalar_zero = Constant <value_int = 0> ()
  shift_range = Range (scalar_zero, eight, width)
  shifts = Cast <to = 2> (shift_range)
  unused = Sub (eight, width)
  unused_byte = Cast <to = 2> (unused)
  all_ones = Constant <value = uint8 {255}> ()
  mask = BitShift <direction = "RIGHT"> (all_ones, unused_byte)
  code_bytes = Unsqueeze (B, last_axis)
  code_shifted = BitShift <direction = "RIGHT"> (code_bytes, shifts)
  code_masked = BitwiseAnd (code_shifted, mask)
  code_shape = Concat <axis = 0> (rows_1d, blocks, block_1d)
  codes = Reshape (code_masked, code_shape)
  zero_bytes = Unsqueeze (zero_points, last_axis)
  zero_shifted = BitShift <direction = "RIGHT"> (zero_bytes, shifts)
  zero_masked = BitwiseAnd (zero_shifted, mask)
  zero_flat_shape = Concat <axis = 0> (rows_1d, rest)
  zero_flat = Reshape (zero_masked, zero_flat_shape)
  zero_used = Slice (zero_flat, zero, blocks, one)
  zero_column = Unsqueeze (zero_used, last_axis)
  codes_float = Cast <to = 1> (codes)
  zeros_float = Cast <to = 1> (zero_column)
  centred = Sub (codes_float, zeros_float)
  scale_shape = Concat <axis = 0> (rows_1d, blocks, one)
  scale_column = Reshape (scales, scale_shape)
  weight_blocks = Mul (centred, scale_column)
  weight_shape = Concat <axis = 0> (rows_1d, rest)
  weight = Reshape (weight_blocks, weight_shape)
  flat_shape = Concat <axis = 0> (rest, columns_1d)
  flat = Reshape (A, flat_shape)
  padded_size = Mul (blocks, block_1d)
  missing = Sub (padded_size, columns_1d)
  pads = Concat <axis = 0> (zero, zero, zero, missing)
  padded = Pad (flat, pads)
  group_shape = Concat <axis = 0> (rest, blocks, block_1d)
  groups = Reshape (padded, group_shape)
  magnitude = Abs (groups)
  largest = ReduceMax <keepdims = 1> (magnitude, last_axis)
  levels = Constant <value_float = 127.0> ()
  float_one = Constant <value_float = 1.0> ()
  float_zero = Constant <value_float = 0.0> ()
  step = Div (largest, levels)
  empty = Equal (step, float_zero)
  safe_step = Where (empty, float_one, step)
  relative = Div (groups, safe_step)
  rounded = Round (relative)
  quantized = Mul (rounded, safe_step)
  int8_level = Constant <value_int = 4> ()
  in_int8 = Equal (level, int8_level)
  used = Where (in_int8, quantized, groups)
  operand_shape = Concat <axis = 0> (rest, padded_size)
  operand = Reshape (used, operand_shape)
  weight_columns = Transpose <perm = [1, 0]> (weight)
  product = MatMul (operand, weight_columns)
  leading = Shape <start = 0, end = -1> (A)
  output_shape = Concat <axis = 0> (leading, rows_1d)
  Y = Reshape (product, output_shape)
}"""

_GATHER_BLOCK_QUANTIZED = """
GatherBlockQuantized <bits, block_size, gather_axis, quantize_axis> (data, indices, scales, zero_points) => (output) {
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  block = Constant <value_int: int = @block_size> ()
  block_1d = Unsqueeze (block, zero)
  width = Constant <value_int: int = @bits> ()
  eight = Constant <value_int = 8> ()
  scalar_zero = Constant <value_int = 0> ()
  shift_range = Range (scalar_zero, eight, width)
  shifts = Cast <to = 2> (shift_range)
  unused = Sub (eight, width)
  unused_byte = Cast <to = 2> (unused)
  all_ones = Constant <value = uint8 {255}> ()
  mask = BitShift <direction = "RIGHT"> (all_ones, unused_byte)
  flat_indices = Reshape (indices, rest)
  count = Shape (flat_indices)
  row_bytes = Gather <axis = 0> (data, flat_indices)
  row_column = Unsqueeze (row_bytes, rest)
  row_shifted = BitShift <direction = "RIGHT"> (row_column, shifts)
  row_masked = BitwiseAnd (row_shifted, mask)
  flat_shape = Concat <axis = 0> (count, rest)
  codes = Reshape (row_masked, flat_shape)
  columns = Shape <start = 1, end = 2> (codes)
  row_scales = Gather <axis = 0> (scales, flat_indices)
  blocks = Shape <start = 1, end = 2> (row_scales)
  zero_bytes = Gather <axis = 0> (zero_points, flat_indices)
  zero_column = Unsqueeze (zero_bytes, rest)
  zero_shifted = BitShift <direction = "RIGHT"> (zero_column, shifts)
  zero_masked = BitwiseAnd (zero_shifted, mask)
  zero_flat = Reshape (zero_masked, flat_shape)
  zero_used = Slice (zero_flat, zero, blocks, one)
  wide_shape = Concat <axis = 0> (count, blocks, block_1d)
  scale_column = Unsqueeze (row_scales, rest)
  scale_wide = Expand (scale_column, wide_shape)
  scale_flat = Reshape (scale_wide, flat_shape)
  scale_used = Slice (scale_flat, zero, columns, one)
  point_column = Unsqueeze (zero_used, rest)
  point_wide = Expand (point_column, wide_shape)
  point_flat = Reshape (point_wide, flat_shape)
  point_used = Slice (point_flat, zero, columns, one)
  codes_float = Cast <to = 1> (codes)
  points_float = Cast <to = 1> (point_used)
  centred = Sub (codes_float, points_float)
  values = Mul (centred, scale_used)
  leading = Shape (indices)
  output_shape = Concat <axis = 0> (leading, columns)
  output = Reshape (values, output_shape)
}"""


def attach_bodies(model: ir.Model) -> list[str]:
    """Add a function body for every contrib operator that the model calls; returns notes on those left without one."""
    calls: dict[str, list[ir.Node]] = {}
    for node in chain(model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values())):
        if node.domain == CONTRIB_DOMAIN:
            calls.setdefault(node.op_type, []).append(node)
    notes = []
    for name, nodes in sorted(calls.items()):
        builder = _BUILDERS.get(name)
        variants = sorted({builder(node) for node in nodes}) if builder else []
        if len(variants) != 1 or not variants[0]:
            why = "it is called in ways that need different bodies" if len(variants) > 1 else "this call has no body"
            notes.append(f"{CONTRIB_DOMAIN}.{name} has no portable body ({why}): the file needs onnxruntime's kernel")
            continue
        function = ir.serde.deserialize_function(parse_body(variants[0]))
        model.functions[function.identifier()] = function
    for key in [key for key in model.functions if key[0] != CONTRIB_DOMAIN]:
        # onnx's ReferenceEvaluator wants a function after those that it calls.
        model.functions[key] = model.functions.pop(key)
    if model.functions:
        model.graph.opset_imports[CONTRIB_DOMAIN] = 1
    return notes


def standard_operators_only(model: ir.Model) -> None:
    """Replace every contrib operator by what ai.onnx has, in place: its own operators of opset 27, or the bodies.

    ``LinearAttention`` and ``CausalConvWithState`` became standard in opset 27 with the contrib operators' inputs. The
    others have no standard form: their bodies are written out at each call.

    Raises:
        LincompileError: a call that neither has.
    """
    import onnx_ir.passes.common as common

    for node in model.graph:
        if node.domain == CONTRIB_DOMAIN and node.op_type in _STANDARD:
            node.domain = ""
            if node.op_type == "CausalConvWithState":
                del node.attributes["ndim"]  # the standard operator has one axis
    if notes := attach_bodies(model):
        raise LincompileError(f"--opset std: {notes[0]}; export with a numbered opset")
    common.InlinePass()(model)
    model.graph.opset_imports[""] = STANDARD_OPSET
    model.graph.opset_imports.pop(CONTRIB_DOMAIN, None)


def parse_body(text: str) -> onnx.FunctionProto:
    """ONNX's textual syntax → a function of the contrib domain."""
    header = f'<domain: "{CONTRIB_DOMAIN}", opset_import: ["" : {BODY_OPSET}]>'
    function: onnx.FunctionProto = parser.parse_function(header + text)
    return function


def _linear_attention(node: ir.Node) -> str:
    rule = node.attributes["update_rule"].as_string()
    given = [value is not None for value in node.inputs] + [False] * (6 - len(node.inputs))
    if not given[3]:
        return ""  # the sizes are read from the past state
    decayed, delta = "gated" in rule, "delta" in rule
    inputs = ["query", "key", "value", "past_state"]
    if decayed or delta:
        inputs.append("decay")
    if delta:
        inputs.append("beta")
    return _LINEAR_ATTENTION.format(
        inputs=", ".join(inputs),
        prepare=(_PREPARE_DECAY if decayed else "") + (_PREPARE_BETA if delta else ""),
        scanned=3 + decayed + delta,
        formals=(", float[] g_t" if decayed else "") + (", float[] b_t" if delta else ""),
        actuals=(", decay_time" if decayed else "") + (", beta_time" if delta else ""),
        step=(_STEP_DECAY if decayed else _STEP_KEEP) + (_STEP_DELTA if delta else _STEP_ADD),
    )


def _causal_conv(node: ir.Node) -> str:
    weight = node.inputs[1]
    width = weight.shape[2] if weight is not None and weight.shape is not None else None
    if not isinstance(width, int) or len(node.inputs) < 4 or node.inputs[3] is None:
        return ""
    return _CAUSAL_CONV.format(
        taps="".join(_CONV_TAP.format(tap=tap) for tap in range(width)),
        terms=", ".join(f"term_{tap}" for tap in range(width)),
    )


def _group_query_attention(node: ir.Node) -> str:
    biased = len(node.inputs) > 10 and node.inputs[10] is not None
    return _GROUP_QUERY_ATTENTION.format(bias=_ATTENTION_BIAS if biased else "  biased = Identity (capped)")


def _matmul_nbits(node: ir.Node) -> str:
    return _MATMUL_NBITS if len(node.inputs) == 4 else ""


_BUILDERS: dict[str, Callable[[ir.Node], str]] = {
    "LinearAttention": _linear_attention,
    "CausalConvWithState": _causal_conv,
    "GroupQueryAttention": _group_query_attention,
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": lambda node: _GATHER_BLOCK_QUANTIZED if len(node.inputs) == 4 else "",
}
