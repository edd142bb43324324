"""Captures a module as a ``Program``: ``torch.export`` with dynamic batch and sequence, checked.

Non-strict export traces every architecture tried; what it needs from us is an example without axes of length one,
the fused inference fast paths of ``torch.nn`` switched off, and a look afterwards at whether the axes stayed dynamic.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule

from .capture_check import check_capture
from .errors import CaptureError, LincompileError
from .graph import (
    aten,
    expression,
    get_attribute,
    is_symbolic,
    set_tensor,
    storage_root,
    target_of,
    tensor_of,
    uncached_fakes,
)
from .inputs import is_token_types
from .program import Program, ProgramInput

MIN_BATCH = 2
MIN_SEQUENCE = 3
AXES = {1: ("batch",), 2: ("batch", "sequence"), 3: ("batch", "sequence")}


def capture(
    module: nn.Module,
    example: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    *,
    prefix: str | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
) -> Program:
    """Captures ``module`` as a graph over ATen with dynamic batch and sequence.

    Args:
        module: any ``nn.Module``; it is traced in eval mode and left as it was.
        example: its inputs by name or by position: tokens ``[B, T]`` (integers), features ``[B, T, C]`` or
            images ``[B, C, H, W]``. Axes of length 1 are repeated, since tracing would fix them.
        prefix: part of the parameter names to drop (a wrapper's attribute, "model."); by default the module's own
            ``prefix`` attribute, if it has one.
        dynamic_shapes: ``{input: {axis: name}}``; by default axis 0 is "batch" and axis 1 "sequence" for inputs
            of up to three dimensions, only axis 0 for larger ones. Inputs with equal lengths share a name.

    Returns:
        A ``Program`` whose parameters are the module's own tensors.

    Raises:
        CaptureError: ``torch.export`` fails, the batch axis can't stay dynamic, the model takes another path at
            other sizes than the example's (a batch of 1 and 1 token included), or it uses ``torch.vmap``.
    """
    inputs = apart(widen(named_inputs(module, example)))
    axes = {name: dict(dynamic_shapes[name]) if dynamic_shapes and name in dynamic_shapes else {} for name in inputs}
    if dynamic_shapes is None:
        axes = guess_axes(inputs)
    exported, axes, notes = _export(module, inputs, axes, explicit=dynamic_shapes is not None)
    prefix = getattr(module, "prefix", "") if prefix is None else prefix
    program = from_exported(exported, prefix=prefix, axes=axes, example=inputs)
    program.notes.extend(notes)
    program.max_positions = _bound(exported, program)
    with _traceable(module):
        check_capture(module, exported, program, inputs)
    return program


def from_exported(
    exported: ExportedProgram,
    *,
    prefix: str = "",
    axes: Mapping[str, Mapping[int, str]] | None = None,
    example: Mapping[str, Tensor] | None = None,
) -> Program:
    """A ``Program`` from an ``ExportedProgram`` (a loaded ``.pt2`` file, say). Parameters stay shared with it."""
    graph_module = _own_graph_module(exported, prefix)
    _check_strides(graph_module)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    given = dict(example or {})
    inputs = []
    for node in placeholders:
        fake = tensor_of(node) if isinstance(node.meta.get("val"), Tensor) else None
        if fake is None:
            raise CaptureError(
                f"the input '{node.name}' isn't a tensor: lincompile compiles models whose inputs are tensors"
            )
        named = dict((axes or {}).get(node.name) or {})
        dynamic = [index for index, dim in enumerate(fake.shape) if is_symbolic(dim)]
        named = {
            index: named.get(index, ("batch", "sequence")[index] if index < 2 else f"axis{index}") for index in dynamic
        }
        inputs.append(ProgramInput(node.name, role_of(node.name, fake), named))
        if node.name not in given:
            given[node.name] = _example_for(fake)
    return Program(graph_module, inputs, {item.name: given[item.name] for item in inputs})


def named_inputs(module: nn.Module, example: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
    """The example as ``{parameter name of forward: tensor}``, in the order forward takes them."""
    if isinstance(example, Mapping):
        values = dict(example)
    else:
        positional = [example] if isinstance(example, Tensor) else list(example)
        names = [
            name
            for name, p in inspect.signature(module.forward).parameters.items()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if len(positional) > len(names):
            raise CaptureError(
                f"{type(module).__name__}.forward takes {len(names)} inputs, the example has {len(positional)}"
            )
        values = dict(zip(names, positional, strict=False))
    if not values:
        raise CaptureError(
            "the example has no inputs: pass the tensors the model's forward takes, by name or by position"
        )
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise CaptureError(f"the example's '{name}' is {type(value).__name__}, not a tensor")
    return values


def widen(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Repeats batch and sequence axes that are too short to stay dynamic (tracing bakes in a length of 1)."""
    result = {}
    for name, value in inputs.items():
        for axis, minimum in ((0, MIN_BATCH), (1, MIN_SEQUENCE)):
            if axis < min(value.dim(), 2) and value.dim() <= 3 and 0 < value.shape[axis] < minimum:
                value = torch.cat([value] * minimum, dim=axis).narrow(axis, 0, minimum)
        result[name] = value
    return result


def apart(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies a tensor that is given for several inputs: export would take them for one input."""
    seen: set[int] = set()
    result = {}
    for name, value in inputs.items():
        result[name] = value.clone() if id(value) in seen else value
        seen.add(id(value))
    return result


def guess_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Names for the dynamic axes: equal lengths share a name, so that related inputs share a symbol."""
    names_by_length: dict[int, str] = {}
    axes: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        named = {}
        for axis, kind in enumerate(AXES.get(value.dim(), ("batch",))):
            if kind == "sequence":
                kind = names_by_length.setdefault(value.shape[axis], f"sequence{len(names_by_length) or ''}")
            named[axis] = kind
        axes[name] = named
    return axes


def role_of(name: str, fake: Tensor) -> str:
    """What an input is for, from its name and dtype. Only conventions: the prover checks what matters."""
    lowered = name.lower()
    if "position" in lowered and not fake.is_floating_point():
        return "positions"
    if "mask" in lowered and fake.dim() == 2:
        return "mask"
    if "type" in lowered or is_token_types(name, fake) or fake.dim() != 2:
        return "features" if fake.is_floating_point() else "other"
    return "other" if fake.is_floating_point() or fake.dtype == torch.bool else "tokens"


@contextmanager
def _traceable(module: nn.Module) -> Iterator[None]:
    """Eval mode without the fused ``torch.nn`` inference paths, which would hide attention in one opaque op."""
    training = {child: child.training for child in module.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), uncached_fakes():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, mode in training.items():
            child.training = mode


def _trace(module: nn.Module, inputs: dict[str, Tensor], shapes: dict[str, dict[int, Any]]) -> ExportedProgram:
    """``torch.export``, without gradients where flex_attention asks for that: on the CPU it has no backward."""
    try:
        return export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except NotImplementedError as error:
        if "FlexAttention does not support backward" not in str(error):
            raise
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        return export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _export(
    module: nn.Module, inputs: dict[str, Tensor], axes: dict[str, dict[int, str]], explicit: bool
) -> tuple[ExportedProgram, dict[str, dict[int, str]], list[str]]:
    """Exports with the widest set of dynamic axes that the model allows."""
    attempts: list[tuple[dict[str, dict[int, str]], bool]] = [(axes, True), (axes, False)]
    if not explicit:
        batch_only = {
            name: {axis: kind for axis, kind in named.items() if kind == "batch"} for name, named in axes.items()
        }
        attempts.append((batch_only, False))
    first_error: Exception | None = None
    for wanted, shared in attempts:
        dims: dict[str, Any] = {}
        shapes: dict[str, dict[int, Any]] = {}
        for name, named in wanted.items():
            shapes[name] = {
                axis: dims.setdefault(kind, Dim(kind)) if shared else Dim.DYNAMIC for axis, kind in named.items()
            }
        try:
            with _traceable(module):
                exported = _trace(module, inputs, shapes)
        except LincompileError:
            raise
        except Exception as error:  # whatever the model's own code raises; reported below, never dropped
            first_error = first_error or error
            continue
        lost = sorted(
            {kind for named in axes.values() for kind in named.values()}
            - {k for named in wanted.values() for k in named.values()}
        )
        notes = (
            [f"the model fixes its {', '.join(lost)} axis: the program runs only at the example's length there"]
            if lost
            else []
        )
        return exported, wanted, notes
    assert first_error is not None
    raise CaptureError(
        f"torch.export can't capture {type(module).__name__}: {_first_line(first_error)}. "
        "Check that forward runs on the example and doesn't branch on tensor values"
    ) from first_error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__


def _own_graph_module(exported: ExportedProgram, prefix: str) -> GraphModule:
    """A plain, trainable, picklable graph module under the teacher's own parameter names.

    ``ExportedProgram.module()`` guards its inputs and refuses to train; its graph is kept and its tensors are
    re-registered (the same objects) on a fresh module, with the wrapper's prefix dropped.
    """
    source = exported.module(check_guards=False)
    root = nn.Module()
    persistent = set(exported.state_dict)
    renamed: dict[str, str] = {}
    for node in source.graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target)
        if path not in renamed:
            value = get_attribute(source, path)
            new = path[len(prefix) :] if prefix and path.startswith(prefix) else path
            renamed[path] = new
            if isinstance(value, nn.Module):
                root.add_module(new, value)
            elif isinstance(value, Tensor):
                set_tensor(root, new, value, persistent=path in persistent)
            else:
                raise CaptureError(
                    f"the graph reads the constant '{path}' ({type(value).__name__}), which lincompile doesn't know"
                )
        node.target = renamed[path]
    for node in source.graph.nodes:
        if prefix and "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = {
                key: (value[0][len(prefix) :] if (value[0] + ".").startswith(prefix) else value[0], value[1])
                for key, value in node.meta["nn_module_stack"].items()
            }
    graph = source.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    graph._tracer_cls = None  # export's tracer needs arguments when unpickled
    graph_module = GraphModule(root, graph)
    return graph_module.eval()


def _check_strides(graph_module: GraphModule) -> None:
    """Refuses ``as_strided`` of a weight that isn't laid out as its shape says: it reads the storage, not the values.

    Copies, files and devices keep a tensor's values and not where they lie.
    """
    for node in graph_module.graph.nodes:
        if target_of(node) != aten.as_strided.default or (root := storage_root(node)).op != "get_attr":
            continue
        name = str(root.target)
        tensor = get_attribute(graph_module, name)
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        if not tensor.is_contiguous() or tensor.storage_offset() or stored != tensor.numel():
            raise CaptureError(
                f"'{node.name}' reads the storage of '{name}' by as_strided, and that tensor is a view of it (shape "
                f"{list(tensor.shape)}, strides {list(tensor.stride())}, offset {tensor.storage_offset()}): make it "
                "contiguous before (parameter.data = parameter.data.clone(memory_format=torch.contiguous_format))"
            )


def _example_for(fake: Tensor) -> Tensor:
    shape = [MIN_BATCH if index == 0 else 8 if is_symbolic(dim) else int(dim) for index, dim in enumerate(fake.shape)]
    return torch.randn(shape, dtype=fake.dtype) if fake.is_floating_point() else torch.ones(shape, dtype=fake.dtype)


def _bound(exported: ExportedProgram, program: Program) -> int | None:
    """Upper end of the sequence symbol's range, where the model's own checks set one."""
    bound: int | None = None
    for item in program.inputs:
        fake = tensor_of(program.placeholder(item.name))
        for axis, kind in item.axes.items():
            dim = fake.shape[axis]
            if kind.startswith("sequence") and is_symbolic(dim):
                upper = exported.range_constraints.get(expression(dim))
                if upper is not None and upper.upper.is_Integer and int(upper.upper) < 2**31:
                    bound = min(bound or int(upper.upper), int(upper.upper))
    return bound
