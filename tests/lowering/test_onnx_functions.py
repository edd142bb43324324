"""The portable bodies, one operator at a time: moved to a foreign domain so that no kernel can stand in for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

import lincompile.kernels.ops  # noqa: E402, F401
from lincompile.lowering.onnx.functions import attach_bodies  # noqa: E402

ops = torch.ops.lincompile
BATCH, TIME, HEADS, KV, SIZE, VALUE = 2, 7, 6, 2, 4, 5
HEAD = 8  # GroupQueryAttention takes multiples of 8


def model_of(name: str, attributes: dict[str, Any], feed: dict[str, Any], outputs: list[str], gaps: list[int]) -> Any:
    """One contrib node over graph inputs; ``gaps`` are the positions of inputs left empty."""
    kinds = {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}
    values: list[Any] = []
    for key, value in feed.items():
        while len(values) in gaps:
            values.append(None)
        kind = ir.TensorType(kinds[str(value.dtype)])
        # dynamic everywhere except the convolution's weight, whose width the body is written for
        shape = list(value.shape) if key == "weight" else [f"{key}{axis}" for axis in range(value.ndim)]
        values.append(ir.Value(name=key, type=kind, shape=ir.Shape(shape)))
    node = ir.node(name, values, attributes, domain="com.microsoft", num_outputs=len(outputs))
    for value, output in zip(node.outputs, outputs, strict=True):
        value.name, value.type = output, ir.TensorType(ir.DataType.FLOAT)
        rank = 3 if output == "output" or name == "CausalConvWithState" else 4
        value.shape = ir.Shape([f"{output}{axis}" for axis in range(rank)])
    given = [value for value in values if value is not None]
    graph = ir.Graph(given, node.outputs, nodes=[node], opset_imports={"": 21, "com.microsoft": 1}, name="g")
    return ir.Model(graph, ir_version=10)


def three_ways(
    name: str, attributes: dict[str, Any], feed: dict[str, Any], outputs: list[str], gaps: tuple[int, ...] = ()
) -> list[list[np.ndarray[Any, Any]]]:
    """Outputs of onnxruntime's kernel, of the body in onnxruntime, and of the body in the ReferenceEvaluator."""
    from onnx.reference import ReferenceEvaluator

    model = model_of(name, attributes, feed, outputs, list(gaps))
    assert attach_bodies(model) == []
    native = ir.serde.serialize_model(model)
    onnx.checker.check_model(native)
    foreign = onnx.ModelProto()
    foreign.CopyFrom(native)
    foreign.graph.node[0].domain = foreign.functions[0].domain = "elsewhere"
    foreign.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    results = []
    for proto in (native, foreign):
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(None, feed))
    results.append(ReferenceEvaluator(native).run(None, feed))
    return results


def agree(results: list[list[np.ndarray[Any, Any]]], wanted: list[Tensor]) -> None:
    for outputs in results:
        for output, tensor in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(output, tensor.numpy(), atol=3e-6, rtol=1e-5)


def pack(x: Tensor) -> np.ndarray[Any, Any]:
    return x.transpose(1, 2).flatten(2).contiguous().numpy()


def unpacked(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rule", ["linear", "gated", "gated-per-head", "delta", "gated_delta"])
def test_linear_attention(rule: str) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(BATCH, HEADS, TIME, SIZE), torch.randn(BATCH, KV, TIME, SIZE) / 2
    v, state = torch.randn(BATCH, KV, TIME, VALUE), torch.randn(BATCH, KV, SIZE, VALUE)
    per_head = rule in ("gated-per-head", "gated_delta")
    decay = -torch.rand(BATCH, KV, TIME, 1 if per_head else SIZE)
    decay[:, :, 2] = -float("inf") if rule.startswith("gated") else decay[:, :, 2]  # forget everything
    beta = torch.rand(BATCH, KV, TIME)
    feed: dict[str, Any] = {"query": pack(q), "key": pack(k), "value": pack(v), "past_state": state.numpy()}
    gaps: tuple[int, ...] = ()
    if rule.startswith("gated"):
        feed["decay"] = pack(decay)
    if "delta" in rule:
        feed["beta"] = beta.transpose(1, 2).contiguous().numpy()
        gaps = () if "decay" in feed else (4,)
        wanted = ops.gated_delta(q, k, v, beta, decay if "decay" in feed else None, state, 0.7)
    else:
        wanted = ops.linear_attention(q, k, v, decay if "decay" in feed else None, state, 0.7, True, False)
    attributes = {"update_rule": rule.split("-")[0], "q_num_heads": HEADS, "kv_num_heads": KV, "scale": 0.7}
    results = three_ways("LinearAttention", attributes, feed, ["output", "present_state"], gaps)
    agree(results, [unpacked(wanted[0]), wanted[1]])


@pytest.mark.parametrize("width", [1, 4])
def test_causal_conv(width: int) -> None:
    torch.manual_seed(0)
    x, weight, state = torch.randn(BATCH, TIME, 6), torch.randn(6, width), torch.randn(BATCH, 6, width - 1)
    feed = {
        "input": x.transpose(1, 2).contiguous().numpy(),
        "weight": weight[:, None].numpy(),
        "past_state": state.numpy(),
    }
    y, final = ops.short_conv(x, weight, state)
    attributes = {"activation": "none", "ndim": 1}
    results = three_ways("CausalConvWithState", attributes, feed, ["output", "present_state"], (2,))
    agree(results, [y.transpose(1, 2), final])


@pytest.mark.parametrize(("window", "softcap"), [(-1, 0.0), (3, 0.0), (-1, 20.0)])
@pytest.mark.parametrize("padded", [False, True])
def test_group_query_attention(window: int, softcap: float, padded: bool) -> None:
    torch.manual_seed(0)
    past = 4
    q = torch.randn(BATCH, HEADS, TIME, HEAD)
    k, v = torch.randn(BATCH, KV, TIME, HEAD), torch.randn(BATCH, KV, TIME, HEAD)
    old_k, old_v = torch.randn(BATCH, KV, past, HEAD), torch.randn(BATCH, KV, past, HEAD)
    total = past + TIME
    padding = torch.ones(BATCH, total, dtype=torch.bool)
    padding[1, :3] = not padded
    feed: dict[str, Any] = {"query": pack(q), "key": pack(k), "value": pack(v)}
    feed |= {"past_key": old_k.numpy(), "past_value": old_v.numpy()}
    feed |= {"seqlens_k": np.full(BATCH, total - 1, np.int32), "total_sequence_length": np.array(total, np.int32)}
    gaps = [7, 8, 9, 11, 12, 13, 14, 15]
    if padded:
        bias = torch.where(padding, 0.0, -1e9)[:, None, None].expand(BATCH, 1, TIME, total)
        feed["attention_bias"] = bias.contiguous().numpy()
    else:
        gaps.append(10)
    feed["query_seqlens"] = np.full(BATCH, TIME, np.int32)
    attributes = {
        "num_heads": HEADS,
        "kv_num_heads": KV,
        "scale": 0.4,
        "local_window_size": window,
        "softcap": softcap,
    }
    names = ["output", "present_key", "present_value"]
    results = three_ways("GroupQueryAttention", attributes, feed, names, tuple(gaps))
    kind = "causal" if window < 0 else "sliding"
    key_padding = padding if padded else None
    o, k_all, v_all = ops.softmax_attention_step(q, k, v, old_k, old_v, key_padding, kind, max(window, 0), 0.4, softcap)
    agree(results, [unpacked(o), k_all, v_all])


def test_two_update_rules_in_one_model_get_no_body() -> None:
    """ONNX finds a function by name alone, so one body can't serve both; the note says so instead."""
    feed = {"query": np.zeros((1, 2, 4), np.float32), "key": np.zeros((1, 2, 4), np.float32)}
    feed |= {"value": np.zeros((1, 2, 4), np.float32), "past_state": np.zeros((1, 1, 4, 4), np.float32)}
    attributes = {"update_rule": "linear", "q_num_heads": 1, "kv_num_heads": 1, "scale": 1.0}
    model = model_of("LinearAttention", attributes, feed, ["output", "present_state"], [])
    first = model.graph[0]
    gated = ir.node(
        "LinearAttention",
        [*first.inputs, first.inputs[1]],
        attributes | {"update_rule": "gated"},
        domain="com.microsoft",
        num_outputs=2,
    )
    model.graph.append(gated)
    notes = attach_bodies(model)
    assert len(notes) == 1 and "different bodies" in notes[0]
    assert not model.functions
