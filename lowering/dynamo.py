"""``torch.compile(model, backend="lincompile")``: proved attention as the canonical op, then another backend.

torch.compile promises the same results, so this backend makes only the rewrite that is an identity: every softmax
attention that is proved canonical becomes ``lincompile::softmax_attention``, which has no mask to build or read and
no repeated KV heads. To change what is computed, linearize the module first (``lincompile.linearize_``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from ..passes.canonicalize import Canonicalize
from ..passes.capture import role_of
from ..passes.errors import LincompileError
from ..passes.graph import aten, expression, is_symbolic, set_tensor, tensor_of, value_of
from ..passes.identity import ProveAttention
from ..passes.pipeline import Pipeline
from ..passes.program import Program, ProgramInput
from ..passes.proof.match import find_candidates
from ..passes.proof.probe import Probe

log = logging.getLogger("lincompile")
OPTIONS = {"backend": "inductor", "on_sites": None}


class Untraceable(Exception):
    """The graph can't be brought to ATen; carries the reason."""


def backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that torch.compile finds under the name "lincompile".

    Args:
        graph_module, example_inputs: as TorchDynamo hands them over.
        mode: refused: it belongs to the backend that runs the result.
        options: ``backend``, what runs the result (default ``inductor``), and ``on_sites``, called with the list of
            ``AttentionSite`` of each graph. What was left alone is also logged, with its reason, to ``lincompile``.

    Raises:
        LincompileError: an unknown option; ``attn`` in particular, since that would change the results.
    """
    chosen = {**OPTIONS, **(options or {})}
    if mode is not None:
        raise LincompileError(f"torch.compile: backend 'lincompile' takes no mode ('{mode}'); use options={{...}}")
    unknown = sorted(set(chosen) - set(OPTIONS))
    if unknown:
        hint = "; call lincompile.linearize_(model, attn=…) first, then compile it" if "attn" in unknown else ""
        raise LincompileError(
            f"torch.compile: backend 'lincompile' has no option '{unknown[0]}'; its options are "
            f"{', '.join(OPTIONS)}{hint}"
        )
    from torch._dynamo.backends.registry import lookup_backend

    inner = lookup_backend(chosen["backend"])
    try:
        program, watched = proved(graph_module, example_inputs)
    except Untraceable as error:
        log.warning("a graph of %d nodes is left as it is: %s", len(graph_module.graph.nodes), error)
        return inner(graph_module, list(example_inputs))
    for site in program.sites:
        log.log(logging.INFO if site.proved else logging.WARNING, "%s: %s: %s", site.path, site.verdict, site.reason)
    if chosen["on_sites"] is not None:
        chosen["on_sites"](program.sites)
    if not any(site.proved for site in program.sites):
        return inner(graph_module, list(example_inputs))
    compiled = inner(program.graph_module, list(example_inputs))
    return guarded(compiled, graph_module, watched, example_inputs) if watched else compiled


def guarded(
    compiled: Callable[..., Any], original: GraphModule, watched: list[int], example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Runs the original graph once a buffer that a proof read (a mask table) has been written to."""
    versions = {index: example_inputs[index]._version for index in watched}

    def run(*inputs: Any) -> Any:
        if all(inputs[index]._version == version for index, version in versions.items()):
            return compiled(*inputs)
        log.warning("a buffer that a mask is read from has changed: attention runs as it was written")
        return original(*inputs)

    return run


def proved(graph_module: GraphModule, example_inputs: Sequence[Any]) -> tuple[Program, list[int]]:
    """The graph over ATen with its attention proved, and the inputs (buffers) whose contents the proofs read.

    Raises:
        Untraceable: the graph can't be traced or its sizes aren't those of its tensors.
    """
    traced = to_aten(graph_module)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    sizes_from_tensors(traced, placeholders)
    originals = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    state = fold_state(traced, placeholders, originals, example_inputs)
    inputs, example = [], {}
    for node, original, value in zip(placeholders, originals, example_inputs, strict=True):
        if isinstance(value_of(node), Tensor) and node not in state.values():
            fake = tensor_of(node)
            node._rename(original.name.removeprefix("l_").strip("_"))
            kinds = ("batch", "sequence", "axis2", "axis3", "axis4", "axis5")
            axes = {axis: kinds[min(axis, 5)] for axis, dim in enumerate(fake.shape) if is_symbolic(dim)}
            inputs.append(ProgramInput(node.name, role_of(node.name, fake), axes))
            example[node.name] = value
    program = Pipeline([Canonicalize()])(Program(traced, inputs, example))
    read = {
        str(node.target)
        for candidate in find_candidates(traced)
        for node in Probe(program, candidate).slice_nodes()
        if node.op == "get_attr"
    }
    watched = [
        index
        for index, node in enumerate(placeholders)
        if any(node is source and name in read for name, source in state.items())
    ]
    if any(example_inputs[index].is_inference() for index in watched):
        raise Untraceable("a mask is read from a buffer made in inference mode, whose changes can't be noticed")
    program = Pipeline([ProveAttention()])(program)
    for node in list(traced.graph.nodes):
        if node.op == "get_attr" and str(node.target) in state:
            node.replace_all_uses_with(state[str(node.target)])
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()
    return program, watched


def to_aten(graph_module: GraphModule) -> GraphModule:
    """TorchDynamo's graph over ATen, before autograd, with symbolic sizes and the places in the source kept."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    fakes = [node.meta.get("example_value") for node in graph_module.graph.nodes if node.op == "placeholder"]
    # not detect_fake_mode: that is the mode that TorchDynamo made for the backend's own tracing
    fake_mode = next((value.fake_mode for value in fakes if isinstance(value, FakeTensor)), None)
    if fake_mode is None or any(value is None for value in fakes):
        raise Untraceable("its inputs carry no fake values")
    try:
        with fake_mode, preserve_node_meta():
            traced = make_fx(
                lambda *args: Interpreter(graph_module).run(*args), pre_dispatch=True, _allow_non_fake_inputs=True
            )(*fakes)
    except Exception as error:  # whatever tracing meets: the graph is then compiled as it is, and that is logged
        raise Untraceable(
            f"it can't be traced to ATen: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(traced, GraphModule)
    return traced


def sizes_from_tensors(traced: GraphModule, placeholders: list[Node]) -> None:
    """Reads sizes that are inputs of their own off the tensor inputs instead."""
    last = placeholders[-1] if placeholders else None
    for node in placeholders:
        if not is_symbolic(value_of(node)) or not node.users:
            continue
        source = next(
            (
                (other, axis)
                for other in placeholders
                if isinstance(value_of(other), Tensor)
                for axis, dim in enumerate(tensor_of(other).shape)
                if expression(dim) == value_of(node).node.expr
            ),
            None,
        )
        if source is None:
            raise Untraceable(f"the size '{node.name}' isn't an axis of any input")
        assert last is not None
        with traced.graph.inserting_after(last):
            size = traced.graph.call_function(aten.sym_size.int, source)
        size.meta["val"] = value_of(node)
        node.replace_all_uses_with(size)


def fold_state(
    traced: GraphModule, placeholders: list[Node], originals: list[Node], example_inputs: Sequence[Any]
) -> dict[str, Node]:
    """Lets parameters and buffers, which TorchDynamo makes inputs, be attributes while passes run.

    Returns:
        ``{attribute path: its placeholder}``, by which they become inputs again afterwards.
    """
    state: dict[str, Node] = {}
    for index, (node, original, value) in enumerate(zip(placeholders, originals, example_inputs, strict=True)):
        parameter = isinstance(value, nn.Parameter)
        if not parameter and "._buffers[" not in source_name(original):
            continue
        names = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source_name(original))
        path = ".".join(names)
        if not path or path in state:
            path = f"state_of_the_model.{index}"
        set_tensor(traced, path, value)
        with traced.graph.inserting_before(placeholders[-1].next):
            attribute = traced.graph.create_node("get_attr", path)
        attribute.meta["val"] = value_of(node)
        node.replace_all_uses_with(attribute)
        state[path] = node
    return state


def source_name(node: Node) -> str:
    """Where TorchDynamo found an input: ``L['self']._modules['attn']._buffers['mask']``."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)
