"""``linearize_``: linear attention in a plain ``nn.Module``, in place, for people who train it themselves.

from lincompile import linearize_
report = linearize_(model, "lawcat", example={"input_ids": ids, "attention_mask": mask})

The module keeps its class, its parameters and their names; what is new lives under ``lincompile_attention``. Its
``forward`` runs the graph that the compiler's own matcher proved and rewrote, for the way it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..canonicalize import Canonicalize
from ..capture import capture, named_inputs
from ..errors import LincompileError, RefusedError
from ..graph import expression, tensor_of
from ..identity import ProveAttention
from ..linearize import MODULE_PREFIX, LinearizeAttention
from ..pipeline import Pipeline
from ..program import Program
from .methods import LOWEST, LinearMethod

MODE_NOTE = "the linearized forward runs as in evaluation mode: dropout and batch-norm updates are off"
Constant = bool | int | float | str
Form = tuple[torch.dtype, torch.device, list[int | str]]


def linearize_(
    module: nn.Module,
    attn: str = "lawcat",
    *,
    example: Mapping[str, Tensor] | Sequence[Tensor] | Tensor | None = None,
    keep: tuple[int, ...] = (),
    count: int = 0,
    sliding: bool = False,
    window: int = 0,
    seed: int = 0,
    rotary: str = "",
    lowest: float | None = LOWEST,
) -> dict[str, Any]:
    """Replaces a module's softmax attention by linear attention, in place.

    Parameters stay the same objects under the same names; the new ones are ``lincompile_attention.<site>.…``. The new
    ``forward`` takes tensors and constants and returns what the old one returned; a call with other inputs than the
    example's, at a fixed axis of another size, or after the module's layers were changed is captured anew (seconds),
    around the same linear attention. Untrained linear attention is far from the teacher: train it.

    Args:
        module: any module. It is captured in evaluation mode.
        attn: gla, hedgehog, lawcat or gated-delta.
        example: the tensors of one call, by name or position; inferred where ``forward`` takes token ids alone.
        keep, count, sliding, window, seed, rotary, lowest: as in ``LinearizeAttention``.

    Returns:
        ``{"sites": [record…], "rewritten": n, "kept": {path: reason}, "parameters_added": n, "notes": […]}``: every
        site that stayed softmax is in ``kept``, with the reason.

    Raises:
        RefusedError: no site could be rewritten. Nothing has been changed then.
        LincompileError: the module can't be captured, was linearized before, or returns what a graph can't.
    """
    if isinstance(vars(module).get("forward"), LinearForward):
        raise LincompileError(f"this {type(module).__name__} was linearized before: linearize_ works once on a module")
    if hasattr(module, MODULE_PREFIX):
        raise LincompileError(f"the module has an attribute '{MODULE_PREFIX}' of its own: rename it")
    if attn == "softmax":
        raise LincompileError("linearize_ with attn='softmax' would change nothing: choose a linear attention")
    if example is None:
        from ..formats.plain import infer_example

        example = infer_example(module)
    options = LinearizeAttention(
        attn, keep=keep, count=count, sliding=sliding, window=window, seed=seed, rotary=rotary, lowest=lowest
    )
    forward = LinearForward(module, options)
    program = forward.install(named_inputs(module, example))
    added = sum(p.numel() for p in module.get_submodule(MODULE_PREFIX).parameters())
    return {
        "sites": [site.record() for site in program.sites],
        "rewritten": len(forward.methods),
        "kept": {site.path: site.reason for site in program.sites if site.method == "softmax"},
        "parameters_added": added,
        "notes": [*program.notes, MODE_NOTE],
    }


@dataclass(frozen=True)
class _Slot:
    """The place of one of the graph's outputs in the module's."""

    index: int


@dataclass
class _Output:
    """What the module returns: its structure, and per leaf the graph output or the constant that goes there."""

    spec: pytree.TreeSpec | None = None
    leaves: list[Any] = field(default_factory=list)

    def of(self, results: Sequence[Tensor]) -> Any:
        assert self.spec is not None
        leaves = [results[leaf.index] if isinstance(leaf, _Slot) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass
class Call:
    """One captured way to call the module: which tensors and constants it takes, and the graph that answers."""

    constants: dict[str, Constant]
    forms: dict[str, Form]
    program: Program
    output: _Output
    state: list[Any] = field(repr=False)


class LinearForward:
    """Stands in a module's ``__dict__`` as its ``forward``."""

    def __init__(self, module: nn.Module, options: LinearizeAttention) -> None:
        self.module, self.options = module, options
        self.own = vars(module).get("forward")  # a forward that someone put there before; usually the class's is used
        self.methods: dict[str, str] = {}  # site path → name of its method below MODULE_PREFIX
        self.calls: list[Call] = []
        self.__signature__ = inspect.signature(module.forward)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "calls": []}  # graphs are captured anew where the copy runs

    def original(self, **arguments: Any) -> Any:
        """The module's forward as it was."""
        if self.own is not None:
            return self.own(**arguments)
        return type(self.module).forward(self.module, **arguments)

    def install(self, tensors: dict[str, Tensor]) -> Program:
        """Captures the example's call and puts the linear attention into the module."""
        call = self.capture(tensors, {})
        program = call.program
        if not self.methods:
            first = program.sites[0] if program.sites else None
            raise RefusedError(
                "the module has no softmax attention"
                if first is None
                else f"no attention site can be rewritten to {self.options.attn}: {first.path}: {first.reason}"
            )
        self.module.add_module(MODULE_PREFIX, program.graph_module.get_submodule(MODULE_PREFIX))
        self.module.forward = self
        call.state = state_of(self.module)
        self.calls.append(call)
        return program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, constants = self.split(args, kwargs)
        call = self.find(tensors, constants)
        if call is None and torch.compiler.is_compiling():
            raise LincompileError(
                "torch.compile met a call of a linearized module that hasn't been captured (a copy, another set of "
                "inputs, or layers exchanged since): make that call once before compiling"
            )
        if call is None:
            call = self.capture(tensors, constants)
            self.calls.append(call)
        return call.output.of(call.program.graph_module(*(tensors[item.name] for item in call.program.inputs)))

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Constant]]:
        """The arguments of a call by name, tensors and constants apart; None counts as left out."""
        bound = self.__signature__.bind(*args, **kwargs)
        tensors: dict[str, Tensor] = {}
        constants: dict[str, Constant] = {}
        for name, value in bound.arguments.items():
            kind = self.__signature__.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise LincompileError(f"a linearized forward takes its inputs by name: '*{name}' isn't supported")
            for key, item in value.items() if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]:
                if isinstance(item, Tensor):
                    tensors[key] = item
                elif isinstance(item, (bool, int, float, str)):
                    constants[key] = item
                elif item is not None:
                    raise LincompileError(
                        f"a linearized forward takes tensors and constants; '{key}' is a {type(item).__name__} "
                        "(for generation with a cache, compile the model: lincompile.compile)"
                    )
        return tensors, constants

    def find(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Constant]) -> Call | None:
        """The captured call whose graph answers this one; calls captured before the module changed are dropped."""
        state = state_of(self.module)
        self.calls = [call for call in self.calls if same_state(call.state, state)]
        return next((c for c in self.calls if c.constants == constants and fits(c.forms, tensors)), None)

    def capture(self, tensors: dict[str, Tensor], constants: dict[str, Constant]) -> Call:
        """Captures, proves and rewrites one way to call the module; the linear attention is the module's own."""
        adapter = _Adapter(self, list(tensors), constants)
        state = state_of(self.module)
        with torch.inference_mode(False), torch.enable_grad():
            captured = capture(adapter, {name: value.detach() for name, value in tensors.items()})
        program = Pipeline([Canonicalize(), ProveAttention(), self.options])(captured)
        rewritten = {site.path: site.details["module"] for site in program.sites if site.method != "softmax"}
        if not self.methods:
            self.methods = rewritten
        elif set(rewritten) != set(self.methods):
            different = sorted(set(rewritten) ^ set(self.methods))[0]
            reason = next((site.reason for site in program.sites if site.path == different), "it isn't found")
            raise LincompileError(
                f"called with {', '.join([*tensors, *constants])}, the site '{different}' isn't rewritten as in the "
                f"example: {reason}; call the module as in the example"
            )
        else:
            for path, name in rewritten.items():
                adopt(program, name, self.module.get_submodule(self.methods[path]), path)
        return Call(constants, form_of(program), program, adapter.seen, state)


class _Adapter(nn.Module):
    """The original forward with tensors by name as its only inputs and a tuple of tensors as its output."""

    prefix = "module."

    def __init__(self, forward: LinearForward, names: list[str], constants: Mapping[str, Constant]) -> None:
        super().__init__()
        self.module = forward.module
        self.seen = _Output()
        seen = self.seen  # export puts back what a forward sets on its module

        def run(**tensors: Tensor) -> tuple[Tensor, ...]:
            values, seen.spec = pytree.tree_flatten(forward.original(**tensors, **constants))
            found: list[Tensor] = []
            seen.leaves = []
            for value in values:
                if isinstance(value, Tensor):
                    seen.leaves.append(_Slot(len(found)))
                    found.append(value)
                elif value is None or isinstance(value, (bool, int, float, str)):
                    seen.leaves.append(value)
                else:
                    raise LincompileError(
                        f"{type(forward.module).__name__} returns a {type(value).__name__}, which a graph can't: "
                        "switch it off (model.config.use_cache = False, for Hugging Face models)"
                    )
            return tuple(found)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in names]
        )
        self.forward = run


def adopt(program: Program, name: str, method: nn.Module, path: str) -> None:
    """Puts an existing method in the place of the fresh one that a new capture made for the same site."""
    fresh = program.graph_module.get_submodule(name)
    assert isinstance(fresh, LinearMethod) and isinstance(method, LinearMethod)
    if fresh.shape != method.shape:
        raise LincompileError(f"the site '{path}' changed its sizes from {method.shape} to {fresh.shape}")
    parent, _, leaf = name.rpartition(".")
    program.graph_module.get_submodule(parent)._modules[leaf] = method


def form_of(program: Program) -> dict[str, Form]:
    """Per input what the program was captured for: dtype, device, and each axis as a number or a symbol's name."""
    forms = {}
    for item in program.inputs:
        fake = tensor_of(program.placeholder(item.name))
        sizes = [expression(dim) for dim in fake.shape]
        forms[item.name] = (fake.dtype, fake.device, [int(n) if n.is_Integer else str(n) for n in sizes])
    return forms


def fits(forms: Mapping[str, Form], tensors: Mapping[str, Tensor]) -> bool:
    """Whether these tensors are of those forms: names, dtypes, devices, and sizes that agree with each other."""
    if list(forms) != list(tensors):
        return False
    known: dict[str, int] = {}
    for name, (dtype, device, sizes) in forms.items():
        value = tensors[name]
        if value.dim() != len(sizes) or value.dtype != dtype or value.device != device:
            return False
        for wanted, size in zip(sizes, value.shape, strict=True):
            if (known.setdefault(wanted, size) if isinstance(wanted, str) else wanted) != size:
                return False
    return True


def state_of(module: nn.Module) -> list[Any]:
    """What a captured graph relies on: which modules and tensors there are, how they are stored, and their hooks."""
    state: list[Any] = []
    for name, child in module.named_modules():
        if name.split(".")[0] == MODULE_PREFIX:
            continue
        state += [child, len(child._forward_hooks) + len(child._forward_pre_hooks) if child is not module else 0]
        for tensor in [*child._parameters.values(), *child._buffers.values()]:
            state += [tensor, None if tensor is None else (tensor.dtype, tensor.device)]
    return state


def same_state(a: list[Any], b: list[Any]) -> bool:
    """Whether two states hold the very same objects, stored in the same way."""
    return len(a) == len(b) and all(
        x is y if isinstance(x, (nn.Module, Tensor)) else x == y for x, y in zip(a, b, strict=True)
    )
