"""The exported graph's inputs and outputs, renamed to what decoders of ONNX models (and onnxruntime-genai) expect.

The step graph takes ``tokens, positions, mask, *states``. The file takes ``input_ids [B, T]``,
``attention_mask [B, P]`` (the past and the new tokens; P ≥ T, and a purely linear model reads the last T columns only),
``position_ids [B, T]`` and, for the i-th attention site, ``past_key_values.<i>.recurrent_state``, ``.conv_state``,
``.key`` and ``.value``, each with its ``present.<i>.*`` output. The step graph's ``mask`` state disappears: the
attention mask holds it. ``logits_from`` is optional (:mod:`.chosen_rows`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import onnx_ir as ir

from ...passes.errors import LincompileError
from .metadata import BoundState
from .quantized import Emitter
from .schemas import PLACEHOLDER_DOMAIN
from .windows import last_real_token

_ROLES = {"recurrent": "recurrent_state", "conv": "conv_state", "key": "key", "value": "value"}


class StateLike(Protocol):
    """What is read of ``passes.stateful.StateSpec``."""

    @property
    def name(self) -> str: ...
    @property
    def site(self) -> Any: ...
    @property
    def role(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | None]: ...


def bind_signature(
    model: ir.Model, states: Sequence[StateLike], dummy_conv: bool = True, whole_mask: bool = False
) -> list[BoundState]:
    """Rename and regroup a step graph's inputs and outputs in place.

    Args:
        model: inputs ``tokens, positions, mask, *states``, outputs ``logits, *states``.
        states: the specifications of the states, in that order.
        dummy_conv: give linear sites without convolution a ``[B, 1, 1]`` state that passes through, without which
            onnxruntime-genai doesn't recognise the layer.
        whole_mask: some layer attends to the whole past, whose mask is then asked for.
    """
    graph = model.graph
    if len(graph.inputs) != 3 + len(states) or len(graph.outputs) != 1 + len(states):
        raise LincompileError(
            f"a step program with {len(states)} states takes {3 + len(states)} inputs and gives {1 + len(states)} "
            f"outputs; the exported graph has {len(graph.inputs)} and {len(graph.outputs)}"
        )
    tokens, positions, mask, *past = list(graph.inputs)
    logits = _distinct_outputs(graph)[0]
    _name_axes(graph, tokens, past, states)
    tokens.name, positions.name, logits.name = "input_ids", "position_ids", "logits"
    attention_mask = ir.Value(
        name="attention_mask", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "total"])
    )
    convolutions = [node for node in graph if node.op_type == "CausalConvWithState"]
    mask_state = next((value for value, state in zip(past, states, strict=True) if state.role == "mask"), None)
    new_mask = _read_last_columns(graph, tokens, positions, attention_mask, mask, mask_state, whole_mask)
    _keep_last_real_inputs(graph, convolutions, tokens, new_mask)
    present = list(graph.outputs)[1:]

    sites = list(dict.fromkeys(state.site for state in states if state.role != "mask"))
    inputs: list[ir.Value] = [tokens, attention_mask, positions]
    outputs: list[ir.Value] = [logits]
    bound: list[BoundState] = []
    for index, site in enumerate(sites):
        rows = [row for row in zip(states, past, present, strict=True) if row[0].site == site and row[0].role != "mask"]
        groups: dict[str, list[tuple[StateLike, ir.Value, ir.Value]]] = {}
        for row in rows:
            groups.setdefault(row[0].role, []).append(row)
        if dummy_conv and "recurrent" in groups and "conv" not in groups:
            before, after = _dummy_state(graph)
            _add(bound, inputs, outputs, index, site, "conv", (1, 1), before, after)
        for role, members in groups.items():
            if role == "conv":
                shape, before, after = _merge_convolutions(graph, members)
            elif len(members) > 1 or role not in _ROLES:
                raise LincompileError(
                    f"site '{site}' has {len(members)} states of role '{role}', which has no ONNX name"
                )
            else:
                state, before, after = members[0]
                shape = tuple(state.shape)
            _add(bound, inputs, outputs, index, site, role, shape, before, after)
    graph.inputs[:] = inputs
    graph.outputs[:] = outputs
    return bound


def _add(
    bound: list[BoundState],
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    index: int,
    site: Any,
    role: str,
    shape: tuple[int | None, ...],
    before: ir.Value,
    after: ir.Value,
) -> None:
    before.name, after.name = f"past_key_values.{index}.{_ROLES[role]}", f"present.{index}.{_ROLES[role]}"
    after.shape = ir.Shape(["batch", *("total" if size is None else size for size in shape)])
    after.type = before.type
    inputs.append(before)
    outputs.append(after)
    bound.append(BoundState(before.name, after.name, str(site), role, shape))


def _distinct_outputs(graph: ir.Graph) -> list[ir.Value]:
    """The outputs, each produced by a node of its own: names can then be given freely."""
    seen: set[int] = set()
    for index, value in enumerate(list(graph.outputs)):
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(id(graph.outputs[index]))
    return list(graph.outputs)


def _name_axes(graph: ir.Graph, tokens: ir.Value, past: Sequence[ir.Value], states: Sequence[StateLike]) -> None:
    """Readable names for the exporter's size symbols, everywhere they occur."""
    names: dict[str, str] = {}

    def learn(value: ir.Value, axis: int, name: str) -> None:
        dim = value.shape[axis] if value.shape is not None else None
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value not in names:
            taken = sum(1 for given in names.values() if given.split("_")[0] == name)
            names[dim.value] = name if not taken else f"{name}_{taken + 1}"

    learn(tokens, 0, "batch")
    learn(tokens, 1, "sequence")
    for value, state in zip(past, states, strict=True):
        learn(value, 0, "batch")
        for axis, size in enumerate(state.shape, start=1):
            if size is None:
                learn(value, axis, "past")
    pattern = re.compile("|".join(rf"\b{re.escape(old)}\b" for old in names) or "(?!)")
    for value in _all_values(graph):
        if value.shape is not None and not value.shape.frozen:
            for axis, dim in enumerate(value.shape):
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                    value.shape[axis] = ir.SymbolicDim(pattern.sub(lambda found: names[found.group()], dim.value))


def _all_values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _read_last_columns(
    graph: ir.Graph,
    tokens: ir.Value,
    positions: ir.Value,
    attention_mask: ir.Value,
    mask: ir.Value,
    mask_state: ir.Value | None,
    whole: bool,
) -> ir.Value:
    """The last T columns of ``position_ids``, and of ``attention_mask`` as ``mask`` (bool); the past mask = the others.

    By index, which is an error where there are fewer: a runtime would stretch a single column over all tokens.

    Returns the mask's last columns as int64.
    """
    users = list(positions.uses())
    emit = Emitter(graph, graph[0])
    length = emit("Shape", tokens, start=1, end=2)
    # Not a range of negative numbers: onnxruntime 1.32 makes a Slice of that, which ends at 0.
    numbers = emit("Range", emit.constant(0), emit("Squeeze", length, emit.constant([0])), emit.constant(1))
    last = emit("Sub", numbers, length)
    new = emit("Gather", attention_mask, last, axis=1)
    _take_over(emit("Cast", new, to=ir.DataType.BOOL.value), mask)
    if mask_state is not None:
        start = emit("Sub", emit("Shape", attention_mask, start=1, end=2), length)
        if users and whole:
            # A mask without the past would be read as that of a shorter one: a token at position p has p before it,
            # so that there must be a column p. Found by index, again; what is found adds nothing.
            farthest = emit("ReduceMax", positions, keepdims=0)
            column = emit("Gather", attention_mask, farthest, axis=1)
            nothing = emit("Min", emit("ReduceMin", column, keepdims=0), emit.constant(0))
            start = emit("Add", start, nothing)
        old = emit("Slice", attention_mask, emit.constant([0]), start, emit.constant([1]))
        _take_over(emit("Cast", old, to=ir.DataType.BOOL.value), mask_state)
    if users:
        read = emit("Gather", positions, last, axis=1)
        read.shape, read.type = positions.shape, positions.type
        for node, index in users:
            node.replace_input_with(index, read)
    positions.shape = tokens.shape
    return new


def _keep_last_real_inputs(graph: ir.Graph, convolutions: Sequence[ir.Node], tokens: ir.Value, mask: ir.Value) -> None:
    """Make each convolution's new state end at a row's last real token instead of at the chunk's end.

    Our own loop pads on the left, where the two are the same. onnxruntime-genai pads on the right: the op itself would
    then carry the padding's zeros into the next token.
    """
    if not convolutions:
        return
    emit = Emitter(graph, convolutions[0])
    last = last_real_token(emit, tokens, mask)
    for node in convolutions:
        x, _, _, past = node.inputs
        if past is None or past.shape is None or not isinstance(past.shape[2], int) or past.shape[2] == 0:
            continue
        width = past.shape[2] + 1
        # Inputs last … last + W − 2 of [past, x] along time: [B, 1, W − 1], the same for every channel.
        columns = emit("Unsqueeze", emit("Add", last, emit.constant(list(range(width - 1)))), emit.constant([1]))
        index = emit("Expand", columns, emit("Shape", past))
        extended = ir.node("Concat", [past, x], {"axis": 2})
        state = ir.node("GatherElements", [extended.outputs[0], index], {"axis": 2})
        graph.insert_after(node, [extended, state])
        old = node.outputs[1]
        state.outputs[0].shape, state.outputs[0].type = old.shape, old.type
        old.replace_all_uses_with(state.outputs[0], replace_graph_outputs=True)


def _take_over(new: ir.Value, old: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new)


def _dummy_state(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    before = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 1, 1]))
    node = ir.node("Identity", [before])
    graph.append(node)
    return before, node.outputs[0]


def _merge_convolutions(
    graph: ir.Graph, members: Sequence[tuple[StateLike, ir.Value, ir.Value]]
) -> tuple[tuple[int | None, ...], ir.Value, ir.Value]:
    """One conv state for a site that has several (query and key): split on the channels, joined again.

    A single one too: onnxruntime-genai hands in one buffer for the old and the new state, which is safe where one node
    reads it and all else descends from that. (An operator of the native library is one node by itself.)
    """
    readers = list(members[0][1].uses())
    if len(members) == 1 and len(readers) == 1 and readers[0].node.domain == PLACEHOLDER_DOMAIN:
        return tuple(members[0][0].shape), members[0][1], members[0][2]
    widths = {state.shape[1] for state, _, _ in members}
    if len(widths) != 1:
        raise LincompileError(
            f"site '{members[0][0].site}' has convolutions of different widths: {sorted(map(str, widths))}"
        )
    channels = [state.shape[0] for state, _, _ in members]
    assert all(isinstance(size, int) for size in channels)
    total = sum(size for size in channels if size is not None)
    width = members[0][0].shape[1]
    before = ir.Value(type=members[0][1].type, shape=ir.Shape(["batch", total, width]))
    sizes = ir.node("Constant", [], {"value_ints": channels})
    split = ir.node("Split", [before, sizes.outputs[0]], {"axis": 1}, num_outputs=len(members))
    graph.insert_before(graph[0], [sizes, split])
    for part, (_, old, _) in zip(split.outputs, members, strict=True):
        _take_over(part, old)
    join = ir.node("Concat", [after for _, _, after in members], {"axis": 1})
    graph.append(join)
    return (total, width), before, join.outputs[0]
