"""Moves magnitude between a layer's inputs and its weights where that is free: before quantization, exactly.

A group's scale is set by its largest member, so one input feature with huge activations costs all others of its group
their precision, and so does one with huge weights. Dividing a feature by ``s`` where it is made and multiplying the
weights that read it by ``s`` changes nothing in the model but evens both out (SmoothQuant, arXiv 2211.10438; AWQ, arXiv
2306.00978). It costs nothing at run time where the feature is made by something with a parameter per feature:

* the weight of a normalization (``weight · normalized``, or ``layer_norm`` with weight and bias);
* one factor of an element-wise product: the rows of ``up`` in ``down(act(gate(x)) · up(x))``.

``s`` is a power of two, so that the float model computes the very same numbers, bit for bit, in any precision. Changed
parameters are new ones: programs and modules that share the old ones keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph import argument, aten, get_attribute, parent_of, target_of
from ..program import Program
from .linear_layers import LinearLayer

# Features that calibration hardly saw, or with hardly any weight, count as this share of the mean.
_FLOOR = 1e-4
Divide = Callable[[Tensor], None]


@dataclass
class Smoothed:
    """By what weights were changed: ``inputs``, multiplied along the input features of the layers that read a feature
    ``[K]``; ``outputs``, divided along the rows of the layers that make one ``[N]``.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def smooth(
    program: Program, layers: Sequence[LinearLayer], importance: Mapping[str, Tensor], strength: float = 1.0
) -> Smoothed:
    """Balance inputs and weights of the layers wherever the graph allows it, in place.

    Args:
        program: a captured program.
        layers: all its linear layers (``find_linears``), those that stay in float too: they may share an input.
        importance: the mean square of each input feature, weighted as one likes, ``[K]``, of the layers to quantize.
        strength: 1 meets in the middle, which suits activations as narrow as the weights; 0 leaves all as it is.

    Returns:
        What changed; a layer's inputs were divided by what its weights were multiplied by.
    """
    module = program.graph_module
    by_call = {call.node: layer for layer in layers for call in layer.calls}
    done = Smoothed()
    for x in dict.fromkeys(call.x for layer in layers for call in layer.calls):
        readers = [user for user in x.users if target_of(user) is not aten._assert_tensor_metadata.default]
        members = [by_call[user] for user in readers if user in by_call and by_call[user].calls[0].x is x]
        wanted = [layer for layer in members if layer.name in importance]
        if len(members) != len(readers) or not wanted or not all(layer.exclusive for layer in members):
            continue
        found = _maker(module, x, by_call)
        if found is None:
            continue
        divide, maker = found
        inputs = [importance[layer.name] for layer in wanted]
        weights = [layer.matrix(module).float().square().sum(dim=0) for layer in wanted]
        scale = balance(torch.stack(inputs).sum(dim=0), torch.stack(weights).sum(dim=0), strength)
        divide(scale)
        for layer in members:
            _multiply(module, layer.weight, scale, axis=0 if layer.stored_transposed else 1)
        done.inputs |= {layer.name: scale for layer in members}
        if maker is not None:
            done.outputs[maker.name] = scale
    return done


def balance(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Powers of two near ``(rms input / rms weight)^(strength/2)``, around 1; both mean squares ``[K]``."""
    inputs, weights = (values.float() / values.float().mean().clamp(min=1e-30) for values in (inputs, weights))
    ratio = inputs.clamp(min=_FLOOR).log2() - weights.clamp(min=_FLOOR).log2()
    return torch.exp2((strength / 4 * (ratio - ratio.mean())).round())


def _maker(
    module: GraphModule, x: Node, by_call: Mapping[Node, LinearLayer]
) -> tuple[Divide, LinearLayer | None] | None:
    """What divides the features of ``x`` by a vector where they are made, and the layer whose rows it divides."""
    width = x.meta["val"].shape[-1]
    if target_of(x) is aten.layer_norm.default:
        weight, bias = argument(x, 2, "weight"), argument(x, 3, "bias")
        vectors = [weight] if bias is None else [weight, bias]
        if all(isinstance(node, Node) and _is_own_vector(module, node, x, width) for node in vectors):
            return partial(_divide, module, [str(node.target) for node in vectors]), None
        return None
    if target_of(x) is not aten.mul.Tensor or x.args[0] is x.args[1]:
        return None
    for factor in x.args:
        if not isinstance(factor, Node):
            continue
        if _is_own_vector(module, factor, x, width):
            return partial(_divide, module, [str(factor.target)]), None
        layer = by_call.get(factor)
        if layer is not None and layer.exclusive and layer.out_features == width and list(factor.users) == [x]:
            return partial(_divide_rows, module, layer), layer
    return None


def _is_own_vector(module: GraphModule, node: Node, reader: Node, width: int) -> bool:
    """Whether ``node`` is a float parameter ``[width]`` that ``reader`` alone reads."""
    if node.op != "get_attr":
        return False
    tensor = get_attribute(module, str(node.target))
    if not isinstance(tensor, nn.Parameter) or tuple(tensor.shape) != (width,) or not tensor.is_floating_point():
        return False
    same = [n for n in module.graph.nodes if n.op == "get_attr" and get_attribute(module, str(n.target)) is tensor]
    return {user for n in same for user in n.users} == {reader}


def _divide(module: GraphModule, paths: Sequence[str], scale: Tensor) -> None:
    for path in paths:
        _multiply(module, path, 1 / scale, axis=0)


def _divide_rows(module: GraphModule, layer: LinearLayer, scale: Tensor) -> None:
    _multiply(module, layer.weight, 1 / scale, axis=1 if layer.stored_transposed else 0)
    bias = layer.calls[0].bias
    if bias is not None:
        _divide(module, [str(bias.target)], scale)


def _multiply(module: GraphModule, path: str, scale: Tensor, axis: int) -> None:
    """Put a scaled copy in a parameter's place; ``scale`` runs along ``axis``."""
    old = get_attribute(module, path)
    shape = [-1 if index == axis else 1 for index in range(old.dim())]
    owner, leaf = parent_of(module, path)
    new = old.detach() * scale.to(old.dtype).view(shape)
    setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
