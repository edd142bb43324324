"""Captures a module as a ``Program``: ``torch.export`` with dynamic batch and sequence, checked.

Non-strict export traces every architecture tried; what it needs from us is an example without axes of length one,
the fused inference fast paths of ``torch.nn`` switched off, and a look afterwards at whether the axes stayed dynamic.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from .errors import CaptureError, LincompileError
from .graph import expression, get_attribute, is_symbolic, set_tensor, tensor_of
from .program import Program, ProgramInput

# Sizes that conditions on sizes are tried at; not 1, which export itself takes for a special case.
BATCHES = (2, 3, 4, 7, 64)
LENGTHS = (2, 3, 5, 6, 7, 8, 12, 13, 16, 31, 64, 70, 100, 129, 1000, 2048, 4097, 70_000)
LONGEST_RUN = 256

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
        CaptureError: ``torch.export`` fails, the batch axis can't stay dynamic, or the model takes another path at
            other sizes than the example's.
    """
    inputs = widen(named_inputs(module, example))
    axes = {name: dict(dynamic_shapes[name]) if dynamic_shapes and name in dynamic_shapes else {} for name in inputs}
    if dynamic_shapes is None:
        axes = guess_axes(inputs)
    exported, axes, notes = _export(module, inputs, axes, explicit=dynamic_shapes is not None)
    prefix = getattr(module, "prefix", "") if prefix is None else prefix
    program = from_exported(exported, prefix=prefix, axes=axes, example=inputs)
    program.notes.extend(notes)
    program.max_positions = _bound(exported, program)
    _check_branches(module, exported, program, inputs)
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
    if "type" in lowered or fake.dim() != 2:
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, mode in training.items():
            child.training = mode


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
                exported = export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
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


def _check_branches(
    module: nn.Module, exported: ExportedProgram, program: Program, inputs: Mapping[str, Tensor]
) -> None:
    """Raises ``CaptureError`` where the traced path is taken at some sizes only and the model computes another there.

    A Python branch on a size leaves nothing in the graph but a condition beside it (``T >= 6``, ``T % 2 == 0``): the
    graph would run at the other sizes, too. Export also writes conditions that change nothing (``T != 64`` for a table
    of 64), so module and program are compared at a size where one fails.
    """
    for guard in getattr(exported, "_guards_code", None) or []:
        try:
            failure = _first_failure(guard, program, inputs)
        except (ArithmeticError, AttributeError, KeyError, NameError, TypeError) as error:
            program.notes.append(f"a condition on the model's sizes couldn't be read: {guard} ({error})")
            continue
        if failure is None:
            continue
        batch, length, given = failure
        if length > LONGEST_RUN or any(value.is_meta for value in inputs.values()):
            program.notes.append(f"what was traced holds only where {guard}; elsewhere nothing is known")
        elif not _same_result(module, program, {name: value.tensor() for name, value in given.items()}):
            raise CaptureError(
                f"the model takes another path at other sizes: what was traced holds only where {guard} "
                f"(not for a batch of {batch} with {length} tokens). Write the branch as masks, or capture the "
                "model in a form that doesn't look at sizes"
            )


def _first_failure(
    guard: str, program: Program, inputs: Mapping[str, Tensor]
) -> tuple[int, int, dict[str, _Resized]] | None:
    """The first batch and length at which a guard's code doesn't hold, and the inputs there."""
    names = {"__builtins__": {"min": min, "max": max, "abs": abs}}
    for batch, length in itertools.product(BATCHES, LENGTHS):
        if program.max_positions is not None and length > program.max_positions:
            continue
        given = {name: _resized(program, name, value, batch, length) for name, value in inputs.items()}
        if not eval(guard, names, {"L": given}):
            return batch, length, given
    return None


class _Resized:
    """An example input at other sizes; stands for it in a guard's code."""

    def __init__(self, value: Tensor, sizes: list[int]) -> None:
        self.value, self.sizes = value, sizes

    def size(self) -> list[int]:
        return self.sizes

    def tensor(self) -> Tensor:
        """The example cut or repeated along each axis."""
        result = self.value
        for axis, size in enumerate(self.sizes):
            result = result.index_select(axis, torch.arange(size, device=result.device) % result.shape[axis])
        return result


def _resized(program: Program, name: str, value: Tensor, batch: int, length: int) -> _Resized:
    item = next((item for item in program.inputs if item.name == name), None)
    axes = item.axes if item is not None else {}
    kinds = [axes.get(axis) for axis in range(value.dim())]
    return _Resized(
        value,
        [
            size if kind is None else batch if kind == "batch" else length
            for kind, size in zip(kinds, value.shape, strict=True)
        ],
    )


@torch.no_grad()
def _same_result(module: nn.Module, program: Program, inputs: dict[str, Tensor]) -> bool:
    """Whether module and program agree; so they do where the module itself refuses the size."""
    try:
        with _traceable(module), torch.random.fork_rng():
            torch.manual_seed(0)
            wanted = module(**inputs)
    except Exception:  # the model's own code: what it refuses, nobody gets a result for
        return True
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = program(**inputs)
    except (RuntimeError, ValueError, AssertionError):
        return False
    first = [x if isinstance(x, Tensor) else next(iter(tree_leaves(x)), None) for x in (wanted, found)]
    if not all(isinstance(x, Tensor) for x in first):
        return False
    left, right = (x.double() for x in first if isinstance(x, Tensor))
    return left.shape == right.shape and bool(
        torch.allclose(left, right, rtol=1e-3, atol=1e-4 * float(left.abs().max()), equal_nan=True)
    )
