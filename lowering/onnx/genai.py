"""``genai_config.json``: what onnxruntime-genai (0.18) reads next to the model to run its own ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from .metadata import BoundState

# One of genai's names for a plain decoder: which states it carries is read from the model's own inputs.
MODEL_TYPE = "decoder"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMES = {
    "past_key_names": ("inputs", "key", "past_key_values.%d.key"),
    "past_value_names": ("inputs", "value", "past_key_values.%d.value"),
    "past_conv_names": ("inputs", "conv", "past_key_values.%d.conv_state"),
    "past_recurrent_names": ("inputs", "recurrent", "past_key_values.%d.recurrent_state"),
    "present_key_names": ("outputs", "key", "present.%d.key"),
    "present_value_names": ("outputs", "value", "present.%d.value"),
    "present_conv_names": ("outputs", "conv", "present.%d.conv_state"),
    "present_recurrent_names": ("outputs", "recurrent", "present.%d.recurrent_state"),
}


def genai_config(
    states: Sequence[BoundState],
    vocabulary: int,
    context_length: int,
    special_tokens: Mapping[str, int | list[int]],
    filename: str,
    shared_cache: bool,
) -> dict[str, Any]:
    """The configuration for a model with these states.

    ``special_tokens`` may name ``bos_token_id``, ``eos_token_id`` (one or several) and ``pad_token_id``; genai needs a
    pad token to batch, for which the end-of-sequence token stands in. ``shared_cache``: each softmax site's past and
    present lie in one buffer of the longest length, so that a token copies nothing; the graph must allow it.
    """
    roles = {state.role for state in states}
    keys = [state for state in states if state.role == "key"]
    recurrent = [state for state in states if state.role == "recurrent"]
    heads, size = _heads(keys or recurrent)
    io: dict[str, dict[str, str]] = {
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids"},
        "outputs": {"logits": "logits"},
    }
    for key, (side, role, pattern) in _NAMES.items():
        if role in roles:
            io[side][key] = pattern
    tokens = {name: special_tokens[name] for name in _SPECIAL_TOKENS if special_tokens.get(name) is not None}
    end = tokens.setdefault("eos_token_id", 0)
    tokens.setdefault("pad_token_id", end[0] if isinstance(end, list) else end)
    return {
        "model": {
            **tokens,
            "context_length": context_length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": size,
                "hidden_size": heads * size,
                **io,
                "num_attention_heads": heads,
                "num_hidden_layers": len({state.site for state in states}),
                "num_key_value_heads": heads,
            },
            "type": MODEL_TYPE,
            "vocab_size": vocabulary,
        },
        "search": {
            "do_sample": False,
            "max_length": context_length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": shared_cache,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def shares_cache(model: ir.Model) -> bool:
    """Whether every cache of keys and values belongs to a GroupQueryAttention, which takes a buffer that is longer than
    what it holds."""
    caches = [value for value in model.graph.inputs if str(value.name).endswith((".key", ".value"))]
    users = [node.op_type for value in caches for node, index in value.uses() if index in (3, 4)]
    return bool(caches) and users.count("GroupQueryAttention") == len(caches)


def genai_obstacles(states: Sequence[BoundState]) -> list[str]:
    """Why onnxruntime-genai couldn't load a model with these states (empty: it can)."""
    obstacles = []
    for role in ("recurrent", "conv"):
        shapes = {state.shape for state in states if state.role == role}
        if len(shapes) > 1:
            listed = ", ".join(str(list(shape)) for shape in sorted(shapes, key=str))
            obstacles.append(f"its {role} states differ in shape ({listed}) and genai allows one")
    return obstacles


def _heads(states: Sequence[BoundState]) -> tuple[int, int]:
    """(kv heads, head size) of the states, the head size being what genai sizes a KV cache with."""
    if not states:
        return 1, 1
    shape = states[0].shape
    if len(shape) == 1:  # a flat state: genai sizes no cache
        return 1, 1
    heads, size = shape[0], shape[-1] if states[0].role == "key" else shape[1]
    assert isinstance(heads, int) and isinstance(size, int)
    return heads, size
