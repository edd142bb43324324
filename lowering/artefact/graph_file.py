"""The step graph on disk: ``program.pt2`` (torch.export's own format) without the weights, which live in safetensors.

The graph is exported with its weights as the first input, a dictionary by name, so that the file holds none of them:
``torch.export.load("program.pt2").module()(weights, (tokens, positions, mask, *states))`` runs it with nothing but
torch and lincompile's ops. :func:`read_graph` puts the weights back as parameters and buffers of a GraphModule.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from ...passes.errors import ArtefactError, LincompileError
from ...passes.graph import on_device, uncached_fakes
from ...passes.stateful import StateSpec

# Sizes at which the graph is traced. 0 and 1 would be baked in, and equal sizes could be taken for the same axis.
TRACE_BATCH, TRACE_CHUNK, TRACE_PAST = 2, 3, 5


def weights_of(graph_module: GraphModule) -> dict[str, Tensor]:
    """Every tensor the graph reads, by attribute path: parameters, buffers, constants; tied ones under each name."""
    weights: dict[str, Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value: Any = graph_module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not isinstance(value, Tensor):
                raise LincompileError(
                    f"the graph reads '{node.target}', a {type(value).__name__}: only tensors can be saved"
                )
            weights[str(node.target)] = value.detach()
    return weights


class _WeightsAsInput(nn.Module):
    """The graph with its weights as an input."""

    def __init__(self, flat: GraphModule, names: Sequence[str]) -> None:
        super().__init__()
        self.flat = flat
        self.names = list(names)

    def forward(self, weights: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
        return self.flat(*(weights[name] for name in self.names), *inputs)


def example_inputs(
    states: Sequence[StateSpec], device: torch.device | str = "cpu"
) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """What a step graph is traced with: tokens, positions, mask and states, and the dynamic axes of each.

    The sizes of dynamic axes differ from each other: equal ones could be taken for the same axis.
    """
    shape = (TRACE_BATCH, TRACE_CHUNK)
    inputs = [
        torch.zeros(shape, dtype=torch.int64, device=device),
        torch.arange(TRACE_CHUNK, device=device).expand(shape).contiguous(),
        torch.ones(shape, dtype=torch.bool, device=device),
    ]
    axes: list[dict[int, Any]] = [{0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for _ in inputs]
    for spec in states:
        sizes = [TRACE_PAST if size is None else size for size in spec.shape]
        inputs.append(torch.zeros(TRACE_BATCH, *sizes, dtype=spec.dtype, device=device))
        axes.append({0: Dim.DYNAMIC} | {i + 1: Dim.DYNAMIC for i, size in enumerate(spec.shape) if size is None})
    return inputs, axes


class Positional(nn.Module):
    """A step graph behind ``*args``, so that one tuple of dynamic shapes serves any number of states."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, *args: Tensor) -> Any:
        return self.step(*args)


def write_graph(graph_module: GraphModule, states: Sequence[StateSpec], path: Path) -> None:
    """Exports a step graph to ``path``, without weights; batch, chunk and growing axes stay dynamic.

    Raises:
        LincompileError: the graph can't be exported (the message carries torch's reason).
    """
    weights = weights_of(graph_module)
    names = sorted(weights)
    device = next(iter(weights.values())).device if weights else torch.device("cpu")
    inputs, axes = example_inputs(states, device)
    lifted = _WeightsAsInput(_lift(graph_module, names), names)
    try:
        with torch.no_grad(), uncached_fakes():
            exported = torch.export.export(
                lifted,
                ({name: weights[name] for name in names}, tuple(inputs)),
                dynamic_shapes=(dict.fromkeys(names), tuple(axes)),
                strict=False,
            )
    except LincompileError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise LincompileError(f"torch.export can't save the step graph: {type(error).__name__}: {first}") from error
    # The example inputs are the weights: they would go into the file.
    exported._example_inputs = None
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that compiled, of no use to the one that runs
    # In memory first: where the disk is full, torch's writer of files ends the process.
    archive = io.BytesIO()
    torch.export.save(exported, archive)
    path.write_bytes(archive.getbuffer())


def _lift(graph_module: GraphModule, names: Sequence[str]) -> GraphModule:
    """A copy of the graph in which each weight is a placeholder, in the order of ``names``, before the other inputs."""
    graph = Graph()
    of_name = {name: graph.placeholder(f"weight_{index}") for index, name in enumerate(names)}
    copies: dict[Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            copies[node] = of_name[str(node.target)]
        elif node.op == "call_module":
            if "_guards_fn" not in str(node.target):
                raise LincompileError(f"the graph calls the module '{node.target}': only graphs of ops can be saved")
        elif node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], lambda arg: copies[arg]))
        else:
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    return GraphModule(nn.Module(), graph)


def move_constants(graph: Graph, device: torch.device) -> None:
    """Makes the tensors that the graph creates itself (``arange``, ``full``) come into being on ``device``.

    Tracing wrote down the device it ran on; a program runs on one device, wherever its weights are. What passes know of
    the nodes' values moves too: they compute with it, beside weights.
    """
    for node in graph.nodes:
        node.args, node.kwargs = on_device((node.args, node.kwargs), device)
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, lambda value: _moved(value, device), node.meta["val"])


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """A node's fake value on another device."""
    if value.device == device or (device.index is None and value.device.type == device.type):
        return value
    with getattr(value, "fake_mode", nullcontext()):
        return value.to(device)


def read_graph(path: Path, weights: Mapping[str, Tensor], parameters: set[str]) -> GraphModule:
    """Loads ``program.pt2`` and attaches the weights, under their names, as parameters (frozen) or buffers.

    The graph runs on the weights' device, whichever it was saved on.

    Raises:
        ArtefactError: the file is damaged, was written by an incompatible torch, or wants weights that aren't there.
    """
    from ...kernels import ops  # noqa: F401  (declares the ops that the graph calls)

    try:
        exported = torch.export.load(path)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ArtefactError(
            f"{path}: torch {torch.__version__} can't load the program ({type(error).__name__}: {first}); "
            "lincompile.json names the torch version that wrote it"
        ) from error
    source = exported.graph_module.graph
    spec = exported.call_spec.in_spec
    (by_name, _), _ = spec.unflatten(list(range(spec.num_leaves)))
    names = {index: name for name, index in by_name.items()}
    missing = [name for name in by_name if name not in weights]
    if missing:
        raise ArtefactError(f"{path}: the program wants the weight '{missing[0]}', which the weights file lacks")

    device = next(iter(weights.values())).device if weights else torch.device("cpu")
    root = nn.Module()
    attached: dict[int, Tensor] = {}  # a tied tensor stays one parameter under all its names
    for name in by_name:
        tensor = attached.setdefault(id(weights[name]), _attached(weights[name], name in parameters))
        _set(root, name, tensor)
    graph = Graph()
    copies: dict[Node, Any] = {}
    placeholders = [node for node in source.nodes if node.op == "placeholder"]
    user = 0
    for node, given in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if given.kind == InputKind.USER_INPUT:
            copies[node] = (
                graph.get_attr(names[user]) if user in names else graph.placeholder(f"input_{user - len(names)}")
            )
            user += 1
        elif given.kind == InputKind.CONSTANT_TENSOR and given.target is not None:
            _set(root, f"_constants.{given.target}", exported.constants[given.target].to(device))
            copies[node] = graph.get_attr(f"_constants.{given.target}")
        else:
            raise ArtefactError(f"{path}: the program has an input of kind {given.kind.name} ('{given.target}')")
        copies[node].meta["val"] = node.meta.get("val")
    for node in source.nodes:
        if node.op == "output":
            graph.output(tuple(copies[item] if isinstance(item, Node) else item for item in node.args[0]))
        elif node.op == "get_attr":
            raise ArtefactError(f"{path}: the program carries the submodule '{node.target}': damaged file?")
        elif node.op != "placeholder" and node.target not in _CHECKS:
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    move_constants(graph, device)
    return GraphModule(root, graph)


# Checks of the trace, not of the data: the artefact's hashes stand for them, and they cost time in every step.
_CHECKS = {torch.ops.aten._assert_tensor_metadata.default}


def _attached(tensor: Tensor, parameter: bool) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def _set(root: nn.Module, path: str, tensor: Tensor) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor)
