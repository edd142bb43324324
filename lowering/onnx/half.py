"""Programs in bfloat16 or float16: computed in float32, stored in the 16 bits that they have.

onnxruntime's CPU kernels compute in float32. A copy of the program with every 16-bit weight, cast and state widened is
what is translated: a widened weight is the same number. In the file those weights are 16-bit again, each with a Cast
that onnxruntime folds when it loads the file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from ...passes.errors import LincompileError
from ...passes.graph import get_attribute, set_tensor
from ...passes.program import share_tensors
from ...passes.stateful import StepProgram
from ..artefact.graph_file import weights_of
from .quantized import Emitter

_HALVES: dict[torch.dtype, Any] = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
_SMALLEST = 1024  # numbers in a weight that is worth a Cast
# The inputs that hold the float16 scales of packed weights, which stay what they are.
_PACKED_SCALES = {
    "lincompile.int6_linear.default": 3,
    "lincompile.int6_embedding.default": 3,
    "lincompile.int8_linear.default": 2,
}


def widened(step: StepProgram) -> tuple[StepProgram, set[torch.dtype]]:
    """The program in float32, and which 16-bit types it had: the program itself, and none, where it had none.

    Raises:
        LincompileError: a node reads a tensor's bits as 16-bit numbers.
    """
    module: nn.Module = step.graph_module
    if not isinstance(module, GraphModule):
        found = {t.dtype for t in module.state_dict().values()} & _HALVES.keys()
        return (replace(step, graph_module=_floated(module)), found) if found else (step, found)
    packed = ((node, _PACKED_SCALES.get(str(node.target))) for node in module.graph.nodes)
    scales = {str(getattr(node.args[index], "target", "")) for node, index in packed if index is not None}
    weights = {name: tensor for name, tensor in weights_of(module).items() if name not in scales}
    found = {tensor.dtype for tensor in weights.values()} & _HALVES.keys()
    if not found:
        return step, found
    wide = share_tensors(module, {})
    floats: dict[int, Tensor] = {}  # a tied tensor stays one tensor
    for name, tensor in weights.items():
        if tensor.dtype in _HALVES:
            own = get_attribute(module, name)
            if id(own) not in floats:
                parameter = isinstance(own, nn.Parameter)
                floats[id(own)] = nn.Parameter(tensor.float(), requires_grad=False) if parameter else tensor.float()
            set_tensor(wide, name, floats[id(own)])
    for node in wide.graph.nodes:
        if node.target == torch.ops.aten.view.dtype:
            raise LincompileError(f"the node '{node.name}' reads bits as numbers of another type: use --dtype float32")
        node.args, node.kwargs = map_aggregate(node.args, _wide_dtype), map_aggregate(node.kwargs, _wide_dtype)
    wide.recompile()
    states = [replace(spec, dtype=_wide_dtype(spec.dtype)) for spec in step.states]
    return replace(step, graph_module=wide, states=states), found


def _wide_dtype(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALVES else value


def _floated(module: nn.Module) -> Any:
    return copy.deepcopy(module).float()


def store_in_half(model: ir.Model, dtypes: Iterable[torch.dtype]) -> int:
    """Store float32 weights in one of ``dtypes`` where that loses nothing, in place; returns how many."""
    graph, count = model.graph, 0
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT or value.const_value is None or value.const_value.size < _SMALLEST:
            continue
        array = value.const_value.numpy()
        for dtype in dtypes:
            half = array.astype(_HALVES[dtype])
            if not np.array_equal(half.astype(np.float32), array):
                continue
            emit = Emitter(graph, graph[0])
            stored = emit.weight(f"{name}.{str(dtype).removeprefix('torch.')}", half)
            cast = emit("Cast", stored, to=ir.DataType.FLOAT.value)
            cast.shape, cast.type = value.shape, value.type
            value.replace_all_uses_with(cast)
            del graph.initializers[name]
            count += 1
            break
    return count
