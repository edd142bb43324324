"""How each ``lincompile::`` op becomes ONNX: the custom translation table of ``torch.onnx.export``.

Every function receives ONNX values whose shapes the exporter has filled in (batch and time symbolic, heads and
feature sizes static) in the order of the op's torch schema, and records nodes of the standard opset plus the contrib
operators of :mod:`.schemas`. Layouts: our ops take ``[B, H, T, D]``, the contrib ones ``[B, T, H·D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from ...passes.errors import LincompileError
from .schemas import (
    CausalConvWithState,
    GroupQueryAttention,
    Int6Embedding,
    Int6Linear,
    Int8Linear,
    LawcatSite,
    LinearAttention,
)

# Added to the scores of keys that a query must not see. Finite on purpose: a row in which every key is padding becomes
# an average instead of NaN, and the float32 kernel rounds any real score away against it.
MASKED_SCORE = -1e9
EPSILON = 1e-10  # of the normaliser, as in kernels/linear_attention
_GQA_HEAD_MULTIPLE = 8  # onnxruntime's CPU kernel refuses other head sizes
_LAST = 9223372036854775807


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """From torch op to translation, for ``torch.onnx.export(custom_translation_table=…)``."""
    import lincompile.kernels.ops  # (declares the ops)
    import lincompile.lowering.onnx.sites  # noqa: F401  (declares lincompile_onnx::lawcat_window)

    ops = torch.ops.lincompile
    return {
        ops.linear_attention.default: linear_attention,
        ops.gated_delta.default: gated_delta,
        ops.short_conv.default: short_conv,
        ops.softmax_attention.default: softmax_attention,
        ops.softmax_attention_step.default: softmax_attention_step,
        ops.int6_linear.default: int6_linear,
        ops.int6_embedding.default: int6_embedding,
        ops.int8_linear.default: int8_linear,
        torch.ops.lincompile_onnx.lawcat_window.default: lawcat_window,
        torch.ops.aten.softplus.default: softplus,
        torch.ops.aten.log_sigmoid.default: log_sigmoid,
        torch.ops.aten.log_sigmoid_forward.default: log_sigmoid_forward,
    }


def _static(value: Any, axis: int, what: str) -> int:
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise LincompileError(f"{what} must be a fixed size to export to ONNX, got {size}")
    return size


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _pack_heads(x: Any) -> Any:
    """``[B, H, T, D]`` → ``[B, T, H·D]``."""
    heads, size = _static(x, 1, "the number of heads"), _static(x, 3, "the head size")
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), _ints(0, 0, heads * size))


def _unpack_heads(x: Any, heads: int, size: int) -> Any:
    """``[B, T, H·D]`` → ``[B, H, T, D]``."""
    return op.Transpose(op.Reshape(x, _ints(0, 0, heads, size)), perm=[0, 2, 1, 3])


def _append_ones(v: Any) -> Any:
    """``[…, D]`` (4 axes) → ``[…, D + 1]`` with a last column of ones, whose state is the normaliser."""
    return op.Pad(v, _ints(0, 0, 0, 0, 0, 0, 0, 1), op.Constant(value_float=1.0))


def _normalise(o: Any, size: int) -> Any:
    numerator = op.Slice(o, _ints(0), _ints(size), _ints(-1))
    denominator = op.Slice(o, _ints(size), _ints(size + 1), _ints(-1))
    return op.Div(numerator, op.Add(denominator, op.Constant(value_float=EPSILON)))


def _as_float(x: Any) -> Any:
    return x if x is None or x.dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT.value)


def _as_type_of(x: Any, other: Any) -> Any:
    return x if other.dtype in (None, ir.DataType.FLOAT) else op.Cast(x, to=other.dtype.value)


def _nonzero_scale(scale: float) -> float:
    if scale == 0:
        raise LincompileError(
            "a scale of 0 can't be exported: the runtime's LinearAttention reads it as 1/sqrt(head size)"
        )
    return scale


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any = None,
    initial_state: Any = None,
    scale: float = 1.0,
    causal: bool = True,
    normalize: bool = False,
) -> tuple[Any, Any]:
    """com.microsoft.LinearAttention (gated or linear), with the ones column for the normaliser."""
    heads, kv_heads = _static(q, 1, "the number of query heads"), _static(k, 1, "the number of key heads")
    size = _static(v, 3, "the value size")
    out_type = v
    q, k, v, log_decay = (_as_float(x) for x in (q, k, v, log_decay))
    columns = size + 1 if normalize else size
    if not causal:
        v = _append_ones(v) if normalize else v
        o, state = _bidirectional(q, k, v, initial_state, heads, kv_heads, scale)
    else:
        by_time = op.Transpose(v, perm=[0, 2, 1, 3])
        # Per-key decay keeps [B, T, Hkv·dk], per-head decay has a last axis of 1: [B, T, Hkv].
        packed, state = LinearAttention(
            _pack_heads(q),
            _pack_heads(k),
            op.Reshape(_append_ones(by_time) if normalize else by_time, _ints(0, 0, kv_heads * columns)),
            initial_state,
            None if log_decay is None else _pack_heads(log_decay),
            update_rule="linear" if log_decay is None else "gated",
            q_num_heads=heads,
            kv_num_heads=kv_heads,
            scale=_nonzero_scale(scale),
        )
        o = op.Reshape(packed, _ints(0, 0, heads, columns))
    if normalize:
        o = _normalise(o, size)
    if causal:  # heads first only now: the graph usually turns them back, and the two transposes cancel
        o = op.Transpose(o, perm=[0, 2, 1, 3])
    return _as_type_of(o, out_type), state


def _bidirectional(
    q: Any, k: Any, v: Any, initial_state: Any, heads: int, kv_heads: int, scale: float
) -> tuple[Any, Any]:
    """Every query reads the total state: two plain products, no recurrence to run."""
    state = op.MatMul(op.Transpose(k, perm=[0, 1, 3, 2]), v)
    if initial_state is not None:
        state = op.Add(state, initial_state)
    size = _static(q, 3, "the head size")
    # [B, Hkv, group · T, D]: query heads that share a state are rows of one product, no copy of the state.
    grouped = op.Reshape(q, _ints(0, kv_heads, -1, size))
    o = op.Mul(op.MatMul(grouped, state), op.Constant(value_float=scale))
    time = op.Shape(q, start=2, end=3)
    target = op.Concat(op.Shape(q, start=0, end=1), _ints(heads), time, _ints(-1), axis=0)
    return op.Reshape(o, target), state


def gated_delta(
    q: Any, k: Any, v: Any, beta: Any, log_decay: Any = None, initial_state: Any = None, scale: float = 1.0
) -> tuple[Any, Any]:
    """com.microsoft.LinearAttention with the delta rule."""
    heads, kv_heads = _static(q, 1, "the number of query heads"), _static(k, 1, "the number of key heads")
    size = _static(v, 3, "the value size")
    out_type = v
    q, k, v, beta, log_decay = (_as_float(x) for x in (q, k, v, beta, log_decay))
    packed, state = LinearAttention(
        _pack_heads(q),
        _pack_heads(k),
        _pack_heads(v),
        initial_state,
        None if log_decay is None else _pack_heads(log_decay),
        op.Transpose(beta, perm=[0, 2, 1]),
        update_rule="delta" if log_decay is None else "gated_delta",
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        scale=_nonzero_scale(scale),
    )
    return _as_type_of(_unpack_heads(packed, heads, size), out_type), state


def short_conv(x: Any, weight: Any, initial_state: Any = None) -> tuple[Any, Any]:
    """com.microsoft.CausalConvWithState; its layout is channels first, ours is ``[B, T, C]``."""
    y, state = CausalConvWithState(
        op.Transpose(x, perm=[0, 2, 1]), op.Unsqueeze(weight, _ints(1)), None, initial_state, activation="none", ndim=1
    )
    return op.Transpose(y, perm=[0, 2, 1]), state


def lawcat_window(
    q: Any,
    k: Any,
    v: Any,
    x: Any,
    cos: Any,
    sin: Any,
    mask: Any,
    past_mask: Any,
    conv_q_state: Any,
    conv_k_state: Any,
    state: Any,
    k_cache: Any,
    v_cache: Any,
    conv_q: Any,
    conv_k: Any,
    map_weight: Any,
    map_bias: Any,
    gate_down: Any,
    gate_up: Any,
    gate_bias: Any,
    mix_weight: Any,
    mix_bias: Any,
    window: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    rotated: bool = False,
    lowest: float | None = None,
) -> tuple[Any, ...]:
    """A placeholder node; :mod:`.lawcat` gives it the file's states. The file's own mask holds the past one."""
    heads, size = _static(q, 1, "the number of query heads"), _static(q, 3, "the head size")
    weights = (conv_q, conv_k, map_weight, map_bias, gate_down, gate_up, gate_bias, mix_weight, mix_bias)
    packed, *new = LawcatSite(
        *(_pack_heads(item) for item in (q, k, v)),
        x,
        cos,
        sin,
        mask,
        *(conv_q_state, conv_k_state, state, k_cache, v_cache),
        *weights,
        num_heads=heads,
        kv_num_heads=_static(k, 1, "the number of key heads"),
        window=window,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        rotated=int(rotated),
        lowest=lowest or 0.0,
    )
    return _unpack_heads(packed, heads, size), *new


def softmax_attention_step(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    key_padding: Any = None,
    kind: str = "causal",
    window: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Any, Any, Any]:
    """com.microsoft.GroupQueryAttention with a growing or a shared cache; padding enters as an additive bias.

    Left padding can't be said through ``seqlens_k`` (that is right padding), hence the bias. ``query_seqlens`` is given
    because without it the kernel refuses a chunk of several tokens after a past in a batch.
    """
    heads, kv_heads = _static(q, 1, "the number of query heads"), _static(k, 1, "the number of key heads")
    size, value_size = _static(q, 3, "the head size"), _static(v, 3, "the value size")
    if kind not in ("causal", "sliding"):
        raise LincompileError(f"a stateful softmax attention is causal or sliding, got '{kind}'")
    total = op.Add(op.Shape(k_cache, start=2, end=3), op.Shape(q, start=2, end=3))
    if key_padding is not None:
        # A cache may be a shared buffer, longer than what it holds (then the mask counts), or trimmed to a sliding
        # window (then the cache does).
        total = op.Min(total, op.Shape(key_padding, start=1, end=2))
    if size != value_size or size % _GQA_HEAD_MULTIPLE:
        return _plain_attention_step(q, k, v, k_cache, v_cache, key_padding, kind, window, scale, softcap, total)
    batch, time = op.Shape(q, start=0, end=1), op.Shape(q, start=2, end=3)
    window = window if kind == "sliding" else 0
    int32 = ir.DataType.INT32.value
    total32 = op.Cast(total, to=int32)
    packed, key, value = GroupQueryAttention(
        _pack_heads(q),
        _pack_heads(k),
        _pack_heads(v),
        k_cache,
        v_cache,
        op.Expand(op.Sub(total32, op.Cast(_ints(1), to=int32)), batch),
        op.Squeeze(total32, _ints(0)),
        None,
        None,
        None,
        None if key_padding is None else _padding_bias(key_padding, batch, time, total, window),
        None,
        None,
        None,
        None,
        None,
        op.Expand(op.Cast(time, to=int32), batch),
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=_nonzero_scale(scale),
        local_window_size=-1 if key_padding is not None or not window else window,
        softcap=softcap,
    )
    return _unpack_heads(packed, heads, size), key, value


def _visible_columns(key_padding: Any, time: Any, total: Any, window: int) -> Any:
    """Bool ``[B, 1, 1 or T, S]`` from bool ``[B, ≥ S]``, the last S columns: real, and with a window near enough.

    A window counts real tokens: padding between them, as onnxruntime-genai leaves on the right of a prompt, takes no
    place in it.
    """
    real = op.Slice(key_padding, op.Neg(total), _ints(_LAST), _ints(1))
    if window <= 0:
        return op.Unsqueeze(real, _ints(1, 2))
    count = op.CumSum(op.Cast(real, to=ir.DataType.INT64.value), op.Constant(value_int=1))
    newest = op.Slice(count, op.Neg(time), _ints(_LAST), _ints(1))
    distance = op.Sub(op.Unsqueeze(newest, _ints(2)), op.Unsqueeze(count, _ints(1)))
    near = op.Less(distance, op.Constant(value_int=window))
    return op.Unsqueeze(op.And(near, op.Unsqueeze(real, _ints(1))), _ints(1))


def _padding_bias(key_padding: Any, batch: Any, time: Any, total: Any, window: int) -> Any:
    """0 or ``MASKED_SCORE`` as ``[B, 1, T, S]``."""
    visible = _visible_columns(key_padding, time, total, window)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=MASKED_SCORE))
    return op.Expand(bias, op.Concat(batch, _ints(1), time, total, axis=0))


def _plain_attention_step(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    key_padding: Any,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
    total: Any,
) -> tuple[Any, Any, Any]:
    """The same in standard operators, for head sizes that GroupQueryAttention doesn't take."""
    key, value = op.Concat(k_cache, k, axis=2), op.Concat(v_cache, v, axis=2)
    time = op.Shape(q, start=2, end=3)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    columns = op.Range(zero, op.Squeeze(total, _ints(0)), one)
    rows = op.Add(op.Range(zero, op.Squeeze(time, _ints(0)), one), op.Sub(total, time))
    distance = op.Sub(op.Unsqueeze(rows, _ints(1)), op.Unsqueeze(columns, _ints(0)))
    visible = op.Unsqueeze(op.GreaterOrEqual(distance, zero), _ints(0, 1))
    window = window if kind == "sliding" else 0
    if key_padding is not None:
        visible = op.And(visible, _visible_columns(key_padding, time, total, window))
    elif window:
        visible = op.And(visible, op.Unsqueeze(op.Less(distance, op.Constant(value_int=window)), _ints(0, 1)))
    return _masked_attention(q, key, value, visible, scale, softcap), key, value


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    key_padding: Any = None,
    kind: str = "full",
    window: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Any:
    """Stateless softmax attention (encoders' kept sites) in standard operators."""
    time, total = op.Shape(q, start=2, end=3), op.Shape(k, start=2, end=3)
    visible = None
    if kind != "full":
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        columns = op.Range(zero, op.Squeeze(total, _ints(0)), one)
        rows = op.Add(op.Range(zero, op.Squeeze(time, _ints(0)), one), op.Sub(total, time))
        distance = op.Sub(op.Unsqueeze(rows, _ints(1)), op.Unsqueeze(columns, _ints(0)))
        visible = op.GreaterOrEqual(distance, zero)
        if kind == "sliding":
            visible = op.And(visible, op.Less(distance, op.Constant(value_int=window)))
        visible = op.Unsqueeze(visible, _ints(0, 1))
    if key_padding is not None:
        padding = op.Unsqueeze(key_padding, _ints(1, 2))
        visible = padding if visible is None else op.And(visible, padding)
    return _masked_attention(q, k, v, visible, scale, softcap)


def _masked_attention(q: Any, k: Any, v: Any, visible: Any, scale: float, softcap: float) -> Any:
    """softmax(q kᵀ · scale) v with un-expanded KV heads; a row that sees no key gives 0, as our op does."""
    heads, kv_heads = _static(q, 1, "the number of query heads"), _static(k, 1, "the number of key heads")
    size = _static(q, 3, "the head size")
    batch, time = op.Shape(q, start=0, end=1), op.Shape(q, start=2, end=3)
    grouped = op.Reshape(q, op.Concat(batch, _ints(kv_heads, heads // kv_heads), time, _ints(size), axis=0))
    scores = op.MatMul(grouped, op.Unsqueeze(op.Transpose(k, perm=[0, 1, 3, 2]), _ints(2)))
    scores = op.Mul(scores, op.Constant(value_float=scale))
    if softcap > 0:
        cap = op.Constant(value_float=softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if visible is not None:
        mask = op.Unsqueeze(visible, _ints(1))  # over the query heads of a group
        scores = op.Where(mask, scores, op.Constant(value_float=MASKED_SCORE))
    weights = op.Softmax(scores, axis=-1)
    if visible is not None:
        weights = op.Where(mask, weights, op.Constant(value_float=0.0))
    o = op.MatMul(weights, op.Unsqueeze(v, _ints(2)))
    return op.Reshape(o, op.Concat(batch, _ints(heads), time, _ints(_static(v, 3, "the value size")), axis=0))


def int6_linear(
    x: Any,
    weight_hi: Any,
    weight_lo: Any,
    weight_scale: Any,
    bias: Any = None,
    group_size: int = 128,
    activation: str = "a8",
) -> Any:
    """A placeholder node; :mod:`.quantized` repacks its weights once they are initializers of the finished graph."""
    return Int6Linear(x, weight_hi, weight_lo, weight_scale, bias, group_size=group_size, activation=activation)


def int6_embedding(
    ids: Any, weight_hi: Any, weight_lo: Any, weight_scale: Any, in_features: int, group_size: int, dtype: Any = None
) -> Any:
    """A placeholder node; :mod:`.embeddings` makes look-ups of it."""
    return Int6Embedding(ids, weight_hi, weight_lo, weight_scale, in_features=in_features, group_size=group_size)


def int8_linear(
    x: Any, weight: Any, weight_scale: Any, bias: Any = None, group_size: int = 128, activation: str = "a8"
) -> Any:
    """A placeholder node, as for :func:`int6_linear`."""
    return Int8Linear(x, weight, weight_scale, bias, group_size=group_size, activation=activation)


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """One node; torch's switch to the identity above ``threshold`` changes nothing that float32 can hold at 20."""
    if beta == 1.0:
        return op.Softplus(x)
    factor = op.Constant(value_float=float(beta))
    return op.Div(op.Softplus(op.Mul(x, factor)), factor)


def log_sigmoid(x: Any) -> Any:
    """``−softplus(−x)``: ``Log(Sigmoid(x))`` is −inf in float32 from x ≈ −88 (and loses digits long before)."""
    return op.Neg(op.Softplus(op.Neg(x)))


def log_sigmoid_forward(x: Any) -> tuple[Any, Any]:
    """The decomposed form; its second output is a buffer for the gradient that inference never reads."""
    return log_sigmoid(x), op.Identity(x)
