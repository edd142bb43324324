"""Signatures of the contrib operators that the exporter emits, so that its recorder can build their nodes.

They follow onnxruntime's own documentation (docs/ContribOperators.md, domain ``com.microsoft``, version 1), cut down to
the inputs and attributes used here. Nothing is registered with onnx: a schema stays inside the op object that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnxscript

CONTRIB_DOMAIN = "com.microsoft"
PLACEHOLDER_DOMAIN = "lincompile"  # nodes that live only between translation and lowering

_Schema = onnx.defs.OpSchema
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = {
    "T": _FLOATS,
    "S": _FLOATS,
    "M": ["tensor(int32)"],
    "U": ["tensor(uint8)"],
    "I": ["tensor(int8)"],
    "B": ["tensor(bool)"],
    "N": ["tensor(int32)", "tensor(int64)"],
}


def _formal(name: str, kind: str) -> Any:
    option = _Schema.FormalParameterOption
    optional = name.endswith("?")
    return _Schema.FormalParameter(name.rstrip("?"), kind, param_option=option.Optional if optional else option.Single)


def _op(
    domain: str,
    name: str,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    attributes: dict[str, Any],
) -> Callable[..., Any]:
    """A callable onnxscript op. ``attributes`` maps a name to its default, or to a type when it is required."""
    used = {kind for _, kind in [*inputs, *outputs]}
    kinds = {int: _Schema.AttrType.INT, float: _Schema.AttrType.FLOAT, str: _Schema.AttrType.STRING}
    schema = _Schema(
        name,
        domain,
        1,
        inputs=[_formal(*item) for item in inputs],
        outputs=[_formal(*item) for item in outputs],
        type_constraints=[(kind, _TYPES[kind], "") for kind in sorted(used)],
        attributes=[
            _Schema.Attribute(key, kinds[value], required=True)
            if isinstance(value, type)
            else _Schema.Attribute(key, onnx.helper.make_attribute(key, value))
            for key, value in attributes.items()
        ],
    )
    op: Callable[..., Any] = onnxscript.values.Op(onnxscript.values.Opset(domain, 1), name, schema)
    return op


LinearAttention = _op(
    CONTRIB_DOMAIN,
    "LinearAttention",
    [("query", "T"), ("key", "T"), ("value", "T"), ("past_state?", "S"), ("decay?", "T"), ("beta?", "T")],
    [("output", "T"), ("present_state", "S")],
    {"update_rule": "gated_delta", "q_num_heads": int, "kv_num_heads": int, "scale": 0.0},
)

CausalConvWithState = _op(
    CONTRIB_DOMAIN,
    "CausalConvWithState",
    [("input", "T"), ("weight", "T"), ("bias?", "T"), ("past_state?", "T")],
    [("output", "T"), ("present_state", "T")],
    {"activation": "none", "ndim": 1},
)

GroupQueryAttention = _op(
    CONTRIB_DOMAIN,
    "GroupQueryAttention",
    [
        ("query", "T"),
        ("key?", "T"),
        ("value?", "T"),
        ("past_key?", "T"),
        ("past_value?", "T"),
        ("seqlens_k", "M"),
        ("total_sequence_length", "M"),
        ("cos_cache?", "T"),
        ("sin_cache?", "T"),
        ("position_ids?", "M"),
        ("attention_bias?", "T"),
        ("head_sink?", "T"),
        ("k_scale?", "T"),
        ("v_scale?", "T"),
        ("q_norm_weight?", "T"),
        ("k_norm_weight?", "T"),
        ("query_seqlens?", "M"),
    ],
    [("output", "T"), ("present_key", "T"), ("present_value", "T")],
    {"num_heads": int, "kv_num_heads": int, "scale": 0.0, "local_window_size": -1, "softcap": 0.0},
)

Int6Linear = _op(
    PLACEHOLDER_DOMAIN,
    "Int6Linear",
    [("x", "T"), ("weight_hi", "U"), ("weight_lo", "U"), ("weight_scale", "S"), ("bias?", "T")],
    [("y", "T")],
    {"group_size": int, "activation": str},
)

Int6Embedding = _op(
    PLACEHOLDER_DOMAIN,
    "Int6Embedding",
    [("ids", "N"), ("weight_hi", "U"), ("weight_lo", "U"), ("weight_scale", "S")],
    [("y", "T")],
    {"in_features": int, "group_size": int},
)

Int8Linear = _op(
    PLACEHOLDER_DOMAIN,
    "Int8Linear",
    [("x", "T"), ("weight", "I"), ("weight_scale", "S"), ("bias?", "T")],
    [("y", "T")],
    {"group_size": int, "activation": str},
)

# The weights after the states are those of ``passes.linearization.methods.Lawcat``; see ``sites.lawcat_window``.
LawcatSite = _op(
    PLACEHOLDER_DOMAIN,
    "LawcatSite",
    [
        ("query", "T"),
        ("key", "T"),
        ("value", "T"),
        ("hidden", "T"),
        ("cos", "T"),
        ("sin", "T"),
        ("mask", "B"),
        *((name, "T") for name in ("conv_q_state", "conv_k_state", "state", "key_cache", "value_cache")),
        *((name, "T") for name in ("conv_q", "conv_k", "map_weight", "map_bias", "gate_down", "gate_up", "gate_bias")),
        *((name, "T") for name in ("mix_weight", "mix_bias")),
    ],
    [(name, "T") for name in ("output", "new_conv_q", "new_conv_k", "new_state", "keys", "values")],
    {"num_heads": int, "kv_num_heads": int, "window": int, "scale": float, "softcap": float, "temperature": float}
    | {"rotated": int, "lowest": float},
)
