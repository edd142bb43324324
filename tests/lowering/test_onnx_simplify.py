"""Simplifications of exported graphs: what they remove, what they leave, and that the numbers stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from onnx import parser  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from lincompile.lowering.onnx.simplify import simplify  # noqa: E402


def simplified(body: str, x_shape: str = "B, T, 6") -> tuple[Any, Any, Counter[str]]:
    """The model before and after, and its operators after (constants left out)."""
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[{x_shape}] x) => (float[] y) {{ {body} }}'
    before = onnx.shape_inference.infer_shapes(parser.parse_model(text), data_prop=True)
    model = ir.serde.deserialize_model(before)
    simplify(model)
    after = ir.serde.serialize_model(model)
    return before, after, Counter(node.op_type for node in after.graph.node if node.op_type != "Constant")


def same_numbers(before: Any, after: Any, *shape: int) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    wanted = ReferenceEvaluator(before).run(None, {"x": x})[0]
    np.testing.assert_allclose(ReferenceEvaluator(after).run(None, {"x": x})[0], wanted, rtol=1e-6)


def test_heads_split_and_joined_again_cost_nothing() -> None:
    body = """
      split = Constant <value_ints = [0, 0, 2, 3]> ()
      join = Constant <value_ints = [0, 0, 6]> ()
      a = Reshape (x, split)
      b = Transpose <perm = [0, 2, 1, 3]> (a)
      c = Transpose <perm = [0, 2, 1, 3]> (b)
      d = Reshape (c, join)
      y = Neg (d)"""
    before, after, counts = simplified(body)
    assert counts == {"Neg": 1}
    same_numbers(before, after, 2, 5, 6)


def test_two_transposes_become_one() -> None:
    body = """
      a = Transpose <perm = [1, 2, 0]> (x)
      b = Transpose <perm = [1, 0, 2]> (a)
      y = Neg (b)"""
    before, after, counts = simplified(body)
    assert counts == {"Transpose": 1, "Neg": 1}
    same_numbers(before, after, 2, 5, 6)


def test_two_reshapes_become_one() -> None:
    body = """
      first = Constant <value_ints = [0, 0, 2, 3]> ()
      second = Constant <value_ints = [0, 0, 3, 2]> ()
      a = Reshape (x, first)
      b = Reshape (a, second)
      y = Neg (b)"""
    before, after, counts = simplified(body)
    assert counts == {"Reshape": 1, "Neg": 1}
    same_numbers(before, after, 2, 5, 6)


def test_reshapes_that_swap_dynamic_axes_stay() -> None:
    """[B, T, 6] seen as [T, B, 6]: symbols that only happen to be free are not equal."""
    body = """
      rest = Constant <value_ints = [6]> ()
      batch = Shape <start = 0, end = 1> (x)
      time = Shape <start = 1, end = 2> (x)
      shape = Concat <axis = 0> (time, batch, rest)
      a = Reshape (x, shape)
      y = Neg (a)"""
    before, after, counts = simplified(body)
    assert counts["Reshape"] == 1
    same_numbers(before, after, 2, 5, 6)


def test_the_norm_is_written_as_a_division() -> None:
    body = """
      two = Constant <value_float = 2.0> ()
      axis = Constant <value_ints = [-1]> ()
      epsilon = Constant <value_float = 1e-10> ()
      squared = Pow (x, two)
      mean = ReduceMean <keepdims = 1> (squared, axis)
      shifted = Add (mean, epsilon)
      root = Sqrt (shifted)
      inverse = Reciprocal (root)
      scaled = Mul (x, inverse)
      y = Neg (scaled)"""
    before, after, counts = simplified(body)
    assert counts == {"Pow": 1, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Div": 1, "Neg": 1}
    same_numbers(before, after, 2, 5, 6)
    zeros = np.zeros((1, 1, 6), np.float32)
    assert np.isfinite(ReferenceEvaluator(after).run(None, {"x": zeros})[0]).all()  # the epsilon is still there


def test_graph_outputs_keep_their_names() -> None:
    body = """
      a = Transpose <perm = [1, 0, 2]> (x)
      y = Transpose <perm = [1, 0, 2]> (a)"""
    before, after, counts = simplified(body)
    assert counts == {"Transpose": 2}
    assert [output.name for output in after.graph.output] == ["y"]
    same_numbers(before, after, 2, 5, 6)
