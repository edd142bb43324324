"""Softmax over the nearest keys beside linear attention: constant state, and work that grows with the window only.

The step graph carries such a site's keys and values as growing caches, for its runner to trim. Stock runtimes don't
trim: onnxruntime's GroupQueryAttention reads the whole cache for one token and multiplies all queries by all keys in a
prefill, whatever its window. Here the site's last W − 1 real tokens move into its recurrent state instead, one flat row
of numbers::

    recurrent_state [B, N] = state (Hkv·F·C) | keys and values of W − 1 tokens (W − 1, 2·Hkv·D) | are they real (W − 1)

and queries are read in blocks of about W, each beside the keys that it can see. Padding on either side of a chunk takes
no place in the window, since what is kept are real tokens. One node reads each state and everything else descends from
its outputs, so a runtime may hand in one buffer for the old and the new state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ...passes.errors import LincompileError
from ...passes.stateful import StateSpec
from .quantized import Emitter
from .translations import MASKED_SCORE

_SMALLEST_BLOCK = 32  # queries read together where the window is smaller


def constant_windows(model: ir.Model, states: Sequence[StateSpec], windows: Mapping[str, int]) -> list[StateSpec]:
    """Rewrite the window of every site that has a recurrent state too, in place.

    Args:
        model: inputs ``tokens, positions, mask, *states``, outputs ``logits, *states``.
        states: the specifications of the states, in that order.
        windows: by site, as in a step program.

    Returns:
        The specifications that are left: a rewritten site has lost its keys and values, and its recurrent state is
        ``[N]``. A site whose head size GroupQueryAttention doesn't take, or whose window is 1, is left as it was.
    """
    graph, kept = model.graph, list(states)
    tokens, _, mask = list(graph.inputs)[:3]
    first = Emitter(graph, graph[0])
    shared: dict[int, Blocks] = {}
    removed: list[ir.Value] = []
    for site, window in windows.items():
        rows = {spec.role: index for index, spec in enumerate(kept) if spec.site == site}
        if window < 2 or not {"recurrent", "key", "value"} <= rows.keys():
            continue
        users = [node for node, _ in graph.inputs[3 + rows["key"]].uses() if node.op_type == "GroupQueryAttention"]
        if len(users) != 1:
            continue
        heads = Heads.of(users[0])
        spec, old = kept[rows["recurrent"]], graph.inputs[3 + rows["recurrent"]]
        past, state, cache, real = _unpack(first, spec, heads, window)
        if window not in shared:
            shared[window] = window_blocks(first, tokens, mask, real, window)
        (node,) = users
        emit = Emitter(graph, node)
        query, key, value = node.inputs[:3]
        output, new_cache = attend(emit, query, emit("Concat", key, value, axis=2), cache, shared[window], heads)
        output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(output)
        state.shape, state.type = old.shape, old.type
        old.replace_all_uses_with(state)
        row = 1 + rows["recurrent"]
        flat = [ir.node("Reshape", [value, emit.constant([0, -1])]) for value in (graph.outputs[row], new_cache)]
        join = ir.node("Concat", [*(item.outputs[0] for item in flat), shared[window].new_real], {"axis": 1})
        graph.extend([*flat, join])
        join.outputs[0].shape, join.outputs[0].type = past.shape, past.type
        graph.inputs[3 + rows["recurrent"]], graph.outputs[row] = past, join.outputs[0]
        kept[rows["recurrent"]] = replace(spec, shape=(past.shape[1],))
        for index in sorted((rows["key"], rows["value"]), reverse=True):
            removed.append(graph.inputs[3 + index])
            del graph.inputs[3 + index], graph.outputs[1 + index], kept[index]
        graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
    for value in removed:
        read_batch_from(value, tokens)
    return kept


def read_batch_from(removed: ir.Value, tokens: ir.Value) -> None:
    """The batch size, which the exporter reads off whichever input it likes, from the tokens instead."""
    for node, index in list(removed.uses()):
        ends = [node.attributes[name].as_int() for name in ("start", "end") if name in node.attributes]
        if node.op_type != "Shape" or ends != [0, 1]:
            raise LincompileError(
                f"the node '{node.name}' ({node.op_type}) reads the cached keys of a window, which have moved into the "
                "recurrent state; please report this model"
            )
        node.replace_input_with(index, tokens)


@dataclass(frozen=True)
class Heads:
    """Sizes and options of a site's softmax attention."""

    kv_heads: int
    group: int
    size: int
    scale: float
    softcap: float

    @staticmethod
    def of(node: ir.Node) -> Heads:
        cache, kv_heads = node.inputs[3], node.attributes["kv_num_heads"].as_int()
        assert cache is not None and cache.shape is not None and isinstance(cache.shape[3], int)
        return Heads(
            kv_heads,
            node.attributes["num_heads"].as_int() // kv_heads,
            cache.shape[3],
            node.attributes["scale"].as_float(),
            node.attributes["softcap"].as_float(),
        )


@dataclass(frozen=True)
class Blocks:
    """What all sites of one window share.

    Attributes:
        columns: int64 ``[blocks, S]``: which of the kept and new tokens each block of queries reads.
        bias: float ``[B, blocks, 1, 1, C, S]``: added to the scores of its C queries, 0 for what they see.
        padding: what ``Pad`` adds to queries ``[B, T, H·D]`` to fill the last block.
        counts: int64 ``[blocks, C]``.
        end: int64 ``[T]``.
        kept: int64 ``[B, W − 1, 1]``: which of the kept and new tokens are kept for the next call.
        new_real: float ``[B, W − 1]``: which of those are real.
    """

    columns: ir.Value
    bias: ir.Value
    padding: ir.Value
    counts: ir.Value
    end: ir.Value
    kept: ir.Value
    new_real: ir.Value


def _unpack(emit: Emitter, spec: StateSpec, heads: Heads, window: int) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """The new input ``[B, N]`` and what it holds: state ``[B, Hkv, F, C]``, cache ``[B, W − 1, 2·Hkv·D]``, real."""
    shape = [size for size in spec.shape if size is not None]
    width = 2 * heads.kv_heads * heads.size
    sizes = [int(np.prod(shape)), (window - 1) * width, window - 1]
    past = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", sum(sizes)]))
    flat_state, flat_cache, real = emit.split(past, sizes, 1)
    state = emit("Reshape", flat_state, emit.constant([0, *shape]))
    cache = emit("Reshape", flat_cache, emit.constant([0, window - 1, width]))
    return past, state, cache, real


def last_real_token(emit: Emitter, tokens: ir.Value, mask: ir.Value) -> ir.Value:
    """int64 ``[B, 1]``: one past the index of the row's last real token in this chunk; 0 where all is padding."""
    length = emit("Squeeze", emit("Shape", tokens, start=1, end=2), emit.constant([0]))
    one = emit.constant(1)
    numbers = emit("Range", one, emit("Add", length, one), one)
    return emit("ReduceMax", emit("Mul", mask, numbers), emit.constant([1]), keepdims=1)


def window_blocks(emit: Emitter, tokens: ir.Value, mask: ir.Value, real: ir.Value, window: int) -> Blocks:
    """What the sites of one window share; ``real`` ``[B, W − 1]``: which of the kept tokens are."""
    past = window - 1
    zero, one = emit.constant(0), emit.constant(1)
    end = emit("Shape", tokens, start=1, end=2)
    size = emit("Min", end, emit.constant([max(window, _SMALLEST_BLOCK)]))
    count = emit("Div", emit("Sub", emit("Add", end, size), emit.constant([1])), size)
    counts = emit("Concat", count, size, axis=0)
    scalar = emit.constant([0])
    starts = emit("Mul", emit("Range", zero, emit("Squeeze", count, scalar), one), size)
    reach = emit("Range", zero, emit("Squeeze", emit("Add", size, emit.constant([past])), scalar), one)
    newest = emit("Add", end, emit.constant([past - 1]))
    # Clipped columns are those that only queries past the end of the chunk would see.
    columns = emit("Min", emit("Add", emit("Unsqueeze", starts, emit.constant([1])), reach), newest)
    within = emit("Range", zero, emit("Squeeze", size, scalar), one)
    distance = emit("Sub", reach, emit("Unsqueeze", within, emit.constant([1])))  # [C, S]: 0 is the oldest in view
    near = emit("And", emit("GreaterOrEqual", distance, zero), emit("LessOrEqual", distance, emit.constant(past)))
    held = emit("Concat", real, emit("Cast", mask, to=ir.DataType.FLOAT.value), axis=1)
    shown = emit("Greater", emit("Gather", held, columns, axis=1), emit.constant(0.5, np.float32))
    visible = emit("And", emit("Unsqueeze", shown, emit.constant([2, 3, 4])), near)
    scores = emit.constant(0.0, np.float32), emit.constant(MASKED_SCORE, np.float32)
    bias = emit("Where", visible, *scores)
    filled = emit("Sub", emit("Mul", count, size), end)
    padding = emit("Concat", emit.constant([0, 0, 0, 0]), filled, emit.constant([0]), axis=0)
    last = last_real_token(emit, tokens, emit("Cast", mask, to=ir.DataType.INT64.value))
    kept = emit("Unsqueeze", emit("Add", last, emit.constant(list(range(past)))), emit.constant([2]))
    return Blocks(columns, bias, padding, counts, end, kept, emit("GatherND", held, kept, batch_dims=1))


def attend(
    emit: Emitter, query: ir.Value | None, keys_values: ir.Value, cache: ir.Value, blocks: Blocks, heads: Heads
) -> tuple[ir.Value, ir.Value]:
    """``[B, T, H·D]`` from queries of that shape and ``[B, T, 2·Hkv·D]``, and the cache of the next call."""
    kv_heads, group, size = heads.kv_heads, heads.group, heads.size
    width = kv_heads * group * size
    held = emit("Concat", cache, keys_values, axis=1)
    new_cache = emit("GatherND", held, blocks.kept, batch_dims=1)
    # [B, blocks, S, 2·Hkv·D] → keys and values [B, blocks, Hkv, 1, S, D]
    read = emit("Gather", held, blocks.columns, axis=1)
    apart = emit("Reshape", read, emit.constant([0, 0, 0, 2 * kv_heads, size]))
    halves = emit.split(emit("Transpose", apart, perm=[0, 1, 3, 2, 4]), [kv_heads, kv_heads], 2)
    keys, values = (emit("Unsqueeze", half, emit.constant([3])) for half in halves)
    padded = emit("Pad", emit("Mul", query, emit.constant(heads.scale, np.float32)), blocks.padding)
    # [B, blocks · C, H·D] → [B, blocks, Hkv, group, C, D]
    split = emit("Concat", emit.constant([0]), blocks.counts, emit.constant([kv_heads, group, size]), axis=0)
    queries = emit("Transpose", emit("Reshape", padded, split), perm=[0, 1, 3, 4, 2, 5])
    scores = emit("MatMul", queries, emit("Transpose", keys, perm=[0, 1, 2, 3, 5, 4]))
    if heads.softcap > 0:
        cap = emit.constant(heads.softcap, np.float32)
        scores = emit("Mul", emit("Tanh", emit("Div", scores, cap)), cap)
    mixed = emit("MatMul", emit("Softmax", emit("Add", scores, blocks.bias), axis=-1), values)
    ordered = emit("Transpose", mixed, perm=[0, 1, 4, 2, 3, 5])
    rows = emit("Reshape", ordered, emit.constant([0, -1, width]))
    return emit("Slice", rows, emit.constant([0]), blocks.end, emit.constant([1])), new_cache
