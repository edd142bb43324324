"""``lincompile.LawcatWindow``: a whole attention site, LAWCAT beside a window, as one operator of the native library.

What lies between a site's projections and its output projection, states included: one node where stock operators take
some hundred, whose objects weigh more in onnxruntime than the weights of a small model's layer. Its body in the file is
those stock operators.

Inputs (float32), for H query and Hkv key heads of D, windows of W and convolutions of K taps:

    qkv            [B, T, (H + 2·Hkv)·D]  queries, keys, values, before the rotary embedding
    hidden         [B, T, E]
    cos, sin       [B, T, D]
    mask           [B, T]                 1 = real token
    past_conv      [B, (H + Hkv)·D, K − 1]
    past_state     [B, N]                 recurrent state | window | are its tokens real, as in windows.py
    conv           [K, (H + Hkv)·D]
    map_weight     [Hkv, D, D]
    map_bias       [Hkv, D]
    projection     [R + 2·H, E]           of the gate, then of the shares
    gate_up        [R, Hkv·2·D]
    gate_bias      [Hkv·2·D]
    mix_bias       [2·H]

Outputs: ``[B, T, H·D]`` (0 at padding), and the states after the last real token.

LAWCAT reads queries and keys before their rotary embedding, with the attribute ``rotated`` = 1 after it. The states of
the convolutions hold what these read. ``lowest`` < 0 is the floor of the log-decays; 0, as in files without it: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ...passes.errors import LincompileError
from ...passes.stateful import StateSpec
from ..native.library import DOMAIN
from .functions import BODY_OPSET
from .quantized import Emitter, constant_tensor
from .schemas import CONTRIB_DOMAIN
from .translations import EPSILON
from .windows import Heads, attend, last_real_token, read_batch_from, window_blocks

LAWCAT_WINDOW = "LawcatWindow"
INPUTS = (
    *("qkv", "hidden", "cos", "sin", "mask", "past_conv", "past_state"),
    *("conv", "map_weight", "map_bias", "projection", "gate_up", "gate_bias", "mix_bias"),
)
OUTPUTS = ("output", "present_conv", "present_state")
_PLACEHOLDER = "LawcatSite"
_ROLES = ("conv", "conv", "recurrent", "key", "value")  # of the placeholder's inputs 7 to 11 and outputs 1 to 5
_ATTRIBUTES = ("num_heads", "kv_num_heads", "window", "scale", "softcap", "temperature", "rotated", "lowest")


@dataclass(frozen=True)
class Sizes:
    """What a site's body is written for. ``rank`` is the width of the gate's projection."""

    heads: int
    kv_heads: int
    size: int
    taps: int
    rank: int
    window: int
    scale: float
    softcap: float
    temperature: float
    rotated: int = 0
    lowest: float = 0.0

    @property
    def state(self) -> list[int]:
        """Lengths of the three parts of the recurrent state."""
        past = self.window - 1
        return [self.kv_heads * 2 * self.size * (self.size + 1), past * 2 * self.kv_heads * self.size, past]

    @property
    def channels(self) -> int:
        """Channels of the convolutions."""
        return (self.heads + self.kv_heads) * self.size


def lower_sites(model: ir.Model, states: Sequence[StateSpec]) -> list[StateSpec]:
    """Replace every placeholder of a site, in place; must come before :func:`.windows.constant_windows`.

    Args:
        model: inputs ``tokens, positions, mask, *states``, outputs ``logits, *states``.
        states: the specifications of the states, in that order.

    Returns:
        The specifications that are left: a site has one conv state and a recurrent state ``[N]``.

    Raises:
        LincompileError: weights that the graph computes, or sites of different sizes.
    """
    graph, kept = model.graph, list(states)
    tokens = graph.inputs[0]
    removed: list[ir.Value] = []
    written: set[Sizes] = set()
    for node in [n for n in graph if n.op_type == _PLACEHOLDER and n.domain == DOMAIN]:
        emit = Emitter(graph, node)
        sizes = _sizes(node)
        written.add(sizes)
        rows = _rows(graph, node, kept)
        conv = _state(("batch", sizes.channels, sizes.taps - 1))
        state = _state(("batch", sum(sizes.state)))
        query, key, value, hidden, cos, sin, mask = node.inputs[:7]
        real = emit("Cast", mask, to=ir.DataType.FLOAT.value)
        qkv = emit("Concat", query, key, value, axis=2)
        given = [qkv, hidden, cos, sin, real, conv, state, *_weights(emit, node)]
        site = ir.node(
            LAWCAT_WINDOW,
            given,
            {name: node.attributes[name].value for name in _ATTRIBUTES},
            domain=DOMAIN,
            num_outputs=len(OUTPUTS),
        )
        graph.insert_before(node, site)
        output, new_conv, new_state = site.outputs
        batch, time = (
            list(hidden.shape)[:2] if hidden is not None and hidden.shape is not None else ("batch", "sequence")
        )
        output.shape, output.type = ir.Shape([batch, time, sizes.heads * sizes.size]), state.type
        node.outputs[0].replace_all_uses_with(output)
        for new, past in ((new_conv, conv), (new_state, state)):
            new.shape, new.type = past.shape, past.type
        for row, past, new in ((rows[0], conv, new_conv), (rows[2], state, new_state)):
            graph.inputs[3 + row], graph.outputs[1 + row] = past, new
            shape = tuple(size for size in past.shape[1:] if isinstance(size, int)) if past.shape is not None else ()
            kept[row] = replace(kept[row], shape=shape)
        for row in sorted((rows[1], rows[3], rows[4]), reverse=True):
            removed.append(graph.inputs[3 + row])
            del graph.inputs[3 + row], graph.outputs[1 + row], kept[row]
        graph.remove(node, safe=True)
    if not written:
        return kept
    if len(written) > 1:
        raise LincompileError(f"attention sites of different sizes can't share an operator's body: {written}")
    common.RemoveUnusedNodesPass()(model)
    for past in removed:
        read_batch_from(past, tokens)
    function = body(written.pop())
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = model.graph.opset_imports[CONTRIB_DOMAIN] = 1
    return kept


def _state(shape: tuple[Any, ...]) -> ir.Value:
    return ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def _rows(graph: ir.Graph, node: ir.Node, states: Sequence[StateSpec]) -> list[int]:
    """Where the placeholder's states are among the program's."""
    rows = []
    for role, past, new in zip(_ROLES, node.inputs[7:12], node.outputs[1:6], strict=True):
        row = next((i for i, value in enumerate(graph.inputs[3:]) if value is past), None)
        if row is None or states[row].role != role or graph.outputs[1 + row] is not new:
            raise LincompileError(f"the {role} state of '{node.name}' isn't a state of the program: please report this")
        rows.append(row)
    return rows


def _sizes(node: ir.Node) -> Sizes:
    attributes = node.attributes
    conv, gate_down = constant_tensor(node, 12), constant_tensor(node, 16)
    size = constant_tensor(node, 14).shape[-1]
    return Sizes(
        attributes["num_heads"].as_int(),
        attributes["kv_num_heads"].as_int(),
        size,
        conv.shape[1],
        gate_down.shape[0],
        *(attributes[name].value for name in _ATTRIBUTES[2:]),
    )


def _weights(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """The operator's inputs from ``conv`` on."""
    names = [str(value.name) if value is not None else "" for value in node.inputs]
    numbers = [constant_tensor(node, index).numpy() for index in range(12, 21)]
    conv_q, conv_k, maps, map_bias, gate_down, gate_up, gate_bias, mix, mix_bias = numbers
    made = {
        f"{names[12].rpartition('.')[0]}.conv": np.concatenate([conv_q, conv_k]).T,
        names[14]: maps,
        f"{names[15]}.rows": map_bias.reshape(map_bias.shape[0], -1),
        f"{names[16].rpartition('.')[0]}.projection": np.concatenate([gate_down, mix]),
        f"{names[17]}.columns": gate_up.T,
        names[18]: gate_bias,
        names[20]: mix_bias,
    }
    known = emit.graph.initializers
    return [known.get(name) or emit.weight(name, np.ascontiguousarray(array)) for name, array in made.items()]


class _Body(Emitter):
    """Adds nodes at the end of a function; its constants are nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.known: dict[str, ir.Value] = {}

    def place(self, node: ir.Node) -> None:
        self.graph.append(node)

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        array = np.asarray(values, dtype=dtype)
        key = f"{array.dtype}{array.tolist()}"
        if key not in self.known:
            self.known[key] = self("Constant", value=ir.tensor(array))
        return self.known[key]

    def real(self, value: float) -> ir.Value:
        return self.constant(value, np.float32)

    def part(self, value: ir.Value, start: int | ir.Value, end: ir.Value | int, axis: int) -> ir.Value:
        edges = [self.constant([edge]) if isinstance(edge, int) else edge for edge in (start, end)]
        return self("Slice", value, *edges, self.constant([axis]))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self("Reshape", value, self.constant(list(shape)))


def body(sizes: Sizes) -> ir.Function:
    """The operator in stock operators."""
    values = {name: ir.Value(name=name) for name in INPUTS}
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": BODY_OPSET, CONTRIB_DOMAIN: 1})
    emit = _Body(graph)
    mask = emit("Unsqueeze", values["mask"], emit.constant([2]))
    heads, kv_heads, size = sizes.heads, sizes.kv_heads, sizes.size
    queries, keys, value = emit.split(values["qkv"], [heads * size, kv_heads * size, kv_heads * size], 2)
    state, cache, real = emit.split(values["past_state"], sizes.state, 1)
    near_q, near_k = (_rotated(emit, x, n, size, values) for x, n in ((queries, heads), (keys, kv_heads)))
    read = (near_q, near_k) if sizes.rotated else (queries, keys)
    features_q, features_k, present_conv = _features(emit, sizes, values, *read, mask)
    projected = emit("MatMul", values["hidden"], emit("Transpose", values["projection"], perm=[1, 0]))
    low, mix = emit.split(projected, [sizes.rank, 2 * heads], 2)
    logits = emit("Add", emit("MatMul", low, values["gate_up"]), values["gate_bias"])
    decay = emit("Div", emit("Softplus", emit("Neg", logits)), emit.real(-sizes.temperature))
    if sizes.lowest:
        decay = emit("Max", decay, emit.real(sizes.lowest))
    ones = emit("Pad", emit.reshape(value, 0, 0, kv_heads, size), emit.constant([0] * 7 + [1]), emit.real(1.0))
    recurrence = ir.node(
        "LinearAttention",
        [
            features_q,
            features_k,
            emit.reshape(ones, 0, 0, kv_heads * (size + 1)),
            emit.reshape(state, 0, kv_heads, 2 * size, size + 1),
            emit("Mul", decay, mask),
        ],
        {"update_rule": "gated", "q_num_heads": heads, "kv_num_heads": kv_heads, "scale": 1.0},
        domain=CONTRIB_DOMAIN,
        num_outputs=2,
    )
    emit.place(recurrence)
    total, weight = emit.split(emit.reshape(recurrence.outputs[0], 0, 0, heads, size + 1), [size, 1], 3)
    far = emit("Div", total, emit("Add", weight, emit.real(EPSILON)))

    blocks = window_blocks(emit, values["hidden"], values["mask"], real, sizes.window)
    layout = Heads(kv_heads, heads // kv_heads, size, sizes.scale, sizes.softcap)
    window = emit.reshape(cache, 0, sizes.window - 1, 2 * kv_heads * size)
    near, new_cache = attend(emit, near_q, emit("Concat", near_k, value, axis=2), window, blocks, layout)

    shares = emit("Unsqueeze", emit("Sigmoid", emit("Add", mix, values["mix_bias"])), emit.constant([3]))
    far_share, near_share = emit.split(shares, [heads, heads], 2)
    mixed = emit("Add", emit("Mul", far, far_share), emit("Mul", emit.reshape(near, 0, 0, heads, size), near_share))
    output = emit("Mul", emit.reshape(mixed, 0, 0, heads * size), mask)
    flat = [emit.reshape(item, 0, -1) for item in (recurrence.outputs[1], new_cache)]
    present_state = emit("Concat", *flat, blocks.new_real, axis=1)
    for value, name in zip((output, present_conv, present_state), OUTPUTS, strict=True):
        value.name = name
        graph.outputs.append(value)
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in _ATTRIBUTES]
    return ir.Function(DOMAIN, LAWCAT_WINDOW, graph=graph, attributes=attributes)


def _features(
    emit: _Body, sizes: Sizes, values: dict[str, ir.Value], queries: ir.Value, keys: ir.Value, mask: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """``[B, T, H·2D]`` of queries, ``[B, T, Hkv·2D]`` of keys, and the new state of the convolutions."""
    kv_heads, group, size = sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.size
    new = emit("Mul", emit("Concat", queries, keys, axis=2), mask)
    extended = emit("Concat", emit("Transpose", values["past_conv"], perm=[0, 2, 1]), new, axis=1)
    time = emit("Shape", values["hidden"], start=1, end=2)
    terms = []
    for tap in range(sizes.taps):
        shifted = emit.part(extended, tap, emit("Add", time, emit.constant([tap])), 1)
        terms.append(emit("Mul", shifted, emit("Gather", values["conv"], emit.constant(tap), axis=0)))
    last = last_real_token(emit, values["hidden"], emit("Cast", values["mask"], to=ir.DataType.INT64.value))
    kept = emit("Unsqueeze", emit("Add", last, emit.constant(list(range(sizes.taps - 1)))), emit.constant([2]))
    present = emit("Transpose", emit("GatherND", extended, kept, batch_dims=1), perm=[0, 2, 1])

    mixed_q, mixed_k = emit.split(emit("Sum", *terms), [sizes.heads * size, kv_heads * size], 2)
    grouped = emit.reshape(mixed_q, 0, 0, kv_heads, group, size), emit.reshape(mixed_k, 0, 0, kv_heads, 1, size)
    rows = emit("Transpose", emit("Concat", *grouped, axis=3), perm=[0, 2, 1, 3, 4])  # [B, Hkv, T, group + 1, D]
    product = emit("MatMul", emit.reshape(rows, 0, 0, -1, size), values["map_weight"])
    logits = emit("Add", product, emit("Unsqueeze", values["map_bias"], emit.constant([1])))
    halves = emit("Softmax", logits, axis=-1), emit("Softmax", emit("Neg", logits), axis=-1)
    both = emit.reshape(emit("Concat", *halves, axis=-1), 0, 0, -1, group + 1, 2 * size)
    apart = emit.split(emit("Transpose", both, perm=[0, 2, 1, 3, 4]), [group, 1], 3)
    features = emit.reshape(apart[0], 0, 0, -1), emit.reshape(apart[1], 0, 0, -1)
    return features[0], emit("Mul", features[1], mask), present


def _rotated(emit: _Body, x: ir.Value, heads: int, size: int, values: dict[str, ir.Value]) -> ir.Value:
    split = emit.reshape(x, 0, 0, heads, size)
    first, second = emit.split(split, [size // 2, size // 2], 3)
    turned = emit("Concat", emit("Neg", second), first, axis=3)
    cos, sin = (emit("Unsqueeze", values[name], emit.constant([2])) for name in ("cos", "sin"))
    both = emit("Add", emit("Mul", split, cos), emit("Mul", turned, sin))
    return emit.reshape(both, 0, 0, heads * size)
