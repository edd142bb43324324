"""What lies between a training graph's matrix products, compiled: a few kernels instead of dozens.

Norms, rotary embeddings, activations and residual sums run op by op at the memory's speed, each reading and writing
everything: on a GPU they take longer than the products. Compiling a graph as a whole takes minutes; but its layers are
alike, so the regions between products come in a handful of shapes, and each shape is compiled once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from ..graph import VIEWS, Builder, aten, finish, is_mutation, target_of, value_of
from ..linearize import PROJECTIONS
from ..proof.match import CONTRACTIONS

PREFIX = "lincompile_region_"
LOSSES_AGREE, GRADIENTS_AGREE = 0.02, 0.1  # relative: products are rounded to bfloat16, and in another order
ROUNDING = 2.0**-9  # of bfloat16, relative
NORMS_MOVE = 0.35  # by rounding, at most: a gradient that is missing, halved or doubled is another one, however rough
REDUCTIONS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.var.correction,
        aten.softmax.int,
        aten.cat.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
    }
)


class Compiled(nn.Module):
    """A module that ``torch.compile`` runs while ``on`` is set, and that runs as it is otherwise.

    Calls of one module, and modules that differ in their parameters alone, share what is compiled.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.compiled = torch.compile(module, dynamic=False)
        self.on = False

    def forward(self, *operands: Tensor, **named: Tensor | None) -> Any:
        return (self.compiled if self.on else self.module)(*operands, **named)


def switch(module: nn.Module, on: bool) -> None:
    """Sets every compiled part of a training graph on or off."""
    for part in module.modules():
        if isinstance(part, Compiled):
            part.on = on


def agrees(learn: Callable[[bool], Tensor], parameters: Sequence[nn.Parameter], note: Callable[[str], None]) -> bool:
    """Whether compiled code computes what plain code does; where not, that is noted and training runs plain.

    ``learn(compiled)`` returns losses and adds to the gradients of ``parameters``, which are left as they were.
    Compared are the losses and, so that nothing as large as the gradients is kept, each gradient's norm and its product
    with a random vector, which moves by about the size of the gradient's error. Where the limits are passed, plain code
    runs again with parameters moved by as much as bfloat16 rounds: a gradient may differ by what it moves then, too,
    its norm by ``NORMS_MOVE`` of that at most.
    """
    plain = _probed(learn, False, parameters)
    try:
        other = _probed(learn, True, parameters)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler's backend raises: plain code needs none of it
        note(f"training runs without torch.compile, and slower: {type(error).__name__}: {str(error)[:300]}")
        return False
    wrong = ~((other.losses - plain.losses).abs() <= LOSSES_AGREE * plain.losses.abs() + 1e-4)
    norms, products = _apart(other, plain)
    excess = torch.maximum(norms, products)
    if bool((excess > GRADIENTS_AGREE).any()):
        with _moved(parameters):
            moved = 3 * torch.maximum(*_apart(_probed(learn, False, parameters), plain))
        moved = moved.nan_to_num(0.0, posinf=0.0)  # what overflows then explains nothing
        excess = torch.maximum(norms - moved.clamp(max=NORMS_MOVE), products - moved)
    far = ~(excess <= GRADIENTS_AGREE)  # NaN is far, too
    if bool(wrong.any()) or bool(far.any()):
        worst = int(excess.nan_to_num(float("inf")).argmax())
        note(
            f"training runs without torch.compile, and slower: compiled, {int(wrong.sum())} of {len(wrong)} losses and "
            f"{int(far.sum())} of {len(far)} gradients were others (most the one of shape "
            f"{tuple(parameters[worst].shape)}, by {float(excess[worst]):.0%})"
        )
        return False
    return True


class _Probes(NamedTuple):
    """Of one step, float64 on the CPU: losses, and for each gradient its norm and its product with a random vector."""

    losses: Tensor
    norms: Tensor
    products: Tensor


def _apart(one: _Probes, plain: _Probes) -> tuple[Tensor, Tensor]:
    """How far gradients lie apart, relative: by their norms, and by a quarter of their products with random vectors."""
    size = plain.norms + 0.01 * plain.norms.max()  # a gradient far smaller than the others is rounding
    size = size.clamp(min=torch.finfo(size.dtype).tiny)
    return (one.norms - plain.norms).abs() / size, (one.products - plain.products).abs() / size / 4


@contextmanager
def _moved(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Every number a 512th larger or smaller, as rounding to bfloat16 may leave it."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                generator = torch.Generator(parameter.device).manual_seed(index)
                up = torch.rand(parameter.shape, generator=generator, device=parameter.device) < 0.5
                parameter.mul_(torch.where(up, 1 + ROUNDING, 1 - ROUNDING).to(parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _probed(learn: Callable[[bool], Tensor], compiled: bool, parameters: Sequence[nn.Parameter]) -> _Probes:
    had = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        losses = learn(compiled).double().reshape(-1).cpu()
        norms, products = [], []
        for index, parameter in enumerate(parameters):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            generator = torch.Generator(gradient.device).manual_seed(index)
            direction = torch.randn(gradient.shape, generator=generator, device=gradient.device)
            norms.append(gradient.double().norm())
            products.append((gradient.double() * direction).sum())
        return _Probes(losses, torch.stack(norms).cpu(), torch.stack(products).cpu())
    finally:
        for parameter, kept in zip(parameters, had, strict=True):
            parameter.grad = kept


def compile_regions(module: GraphModule, products: torch.dtype | None) -> int:
    """Puts what lies between products into modules of their own, one for all regions that are alike.

    ``products``: the dtype that autocast gives the products; what feeds them is cast once, inside the region.
    Returns the number of different regions.
    """
    if any(map(is_mutation, module.graph.nodes)):
        return 0  # moving nodes would move reads past writes
    if products is not None:
        _cast_once(module, products)
    regions = _regions(module)
    if not regions:
        return 0
    fuse_by_partitions(module, [dict.fromkeys(region) for region in regions], prefix=PREFIX, always_return_tuple=True)
    known: dict[Any, str] = {}
    for node in [n for n in module.graph.nodes if n.op == "call_module" and str(n.target).startswith(PREFIX)]:
        name = str(node.target)
        region = module.get_submodule(name)
        assert isinstance(region, GraphModule)
        signature = _signature(region)
        if signature in known:
            node.target = known[signature]
            delattr(module, name)
        else:
            known[signature] = name
            setattr(module, name, Compiled(region))
    finish(module)
    return len(known)


def _light(node: Node) -> bool:
    """Whether a node computes element by element, reduces or views, and nothing more."""
    target = target_of(node)
    if target in PROJECTIONS | CONTRACTIONS or not isinstance(value_of(node), (Tensor, tuple, list)):
        return False
    if target in VIEWS or target in REDUCTIONS:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _regions(module: GraphModule) -> list[list[Node]]:
    """Connected light nodes of one depth: the number of heavy nodes that any path to a node passes at most.

    A path from one light node through a heavy one to another makes the second one deeper, so nodes of one depth can
    run together whatever else connects them.
    """
    depth: dict[Node, int] = {}
    light: dict[Node, Node] = {}  # a union-find forest

    def root(node: Node) -> Node:
        while light[node] is not node:
            light[node] = light[light[node]]
            node = light[node]
        return node

    for node in module.graph.nodes:
        is_light = _light(node)
        depth[node] = max((depth[i] + (is_light and i not in light) for i in node.all_input_nodes), default=0)
        if is_light:
            light[node] = node
            for item in node.all_input_nodes:
                if item in light and depth[item] == depth[node]:
                    light[root(item)] = root(node)
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in light:
        groups[root(node)].append(node)
    return [group for group in map(_without_last_views, groups.values()) if sum(map(_works, group)) > 1]


def _works(node: Node) -> bool:
    """Whether a light node costs anything."""
    return target_of(node) not in VIEWS or target_of(node) is aten.to.dtype


def _without_last_views(group: list[Node]) -> list[Node]:
    """The group but for views that only others read: a compiled module returns memory of its own more cheaply."""
    members = set(group)
    for node in reversed(group):
        if not _works(node) and not any(user in members for user in node.users):
            members.remove(node)
    return [node for node in group if node in members]


def _cast_once(module: GraphModule, dtype: torch.dtype) -> None:
    """Casts activations for the products they feed where they are made: autocast would cast them at each product."""
    for node in list(module.graph.nodes):
        value = value_of(node)
        if node.op != "call_function" or not isinstance(value, Tensor) or value.dtype != torch.float32:
            continue
        readers = [user for user in node.users if target_of(user) in PROJECTIONS]
        if target_of(node) in PROJECTIONS or not readers:
            continue
        cast = Builder(module, node.next)(aten.to.dtype, node, dtype)
        for user in readers:
            user.replace_input_with(node, cast)


def _signature(region: GraphModule) -> tuple[Any, ...]:
    """Equal for regions that compute the same: their ops, constants, wiring, and the inputs' types and shapes."""
    places: dict[Node, int] = {}

    def described(node: Node) -> Iterator[Any]:
        yield node.op
        yield str(node.target) if node.op == "call_function" else ""
        yield str(torch.fx.map_arg((node.args, node.kwargs), lambda n: f"%{places[n]}"))
        value = value_of(node)
        if node.op == "placeholder":
            yield (value.dtype, str(tuple(value.shape))) if isinstance(value, Tensor) else str(type(value))

    rows = []
    for node in region.graph.nodes:
        rows.append(tuple(described(node)))
        places[node] = len(places)
    return tuple(rows)
