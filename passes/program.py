"""The compiler's intermediate representation: a captured graph, its inputs, its attention sites and its history."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .errors import LincompileError, RefusedError
from .graph import expression, is_symbolic, symbols_in, target_of, tensor_of, value_inputs, value_of


@dataclass
class ProgramInput:
    """One input of the captured graph.

    ``role`` is ``tokens`` (integer ids ``[B, T]``), ``mask`` (``[B, T]``), ``positions`` (``[B, T]``), ``features``
    (floating point) or ``other``. ``axes`` names the dynamic axes: ``{0: "batch", 1: "sequence"}``.
    ``inverted`` says what a mask holds, as far as it is known: False, 1 or True for real tokens; True, for padding.
    ``problem``: why nobody but the model's user can say what the input is to hold.
    """

    name: str
    role: str
    axes: dict[int, str]
    inverted: bool | None = None
    problem: str = ""

    def masking(self, real: Tensor) -> Tensor:
        """What a mask input holds for tokens that are ``real`` (1 or True) and padding (0 or False).

        Raises:
            RefusedError: it isn't known.
        """
        if self.problem:
            raise RefusedError(self.problem)
        return real == 0 if self.inverted else real

    def real(self, mask: Tensor) -> Tensor:
        """Which tokens are real, bool, as the values of a mask input say."""
        return mask == 0 if self.inverted else mask != 0


@dataclass
class AttentionSite:
    """One softmax attention of the model: what was found, what was proved, and what became of it.

    ``kind`` is full, causal or sliding when proved, otherwise a short name of what was seen (``prefix-lm``,
    ``data-dependent`` …). ``max_error`` is the largest absolute difference, outputs and gradients, between the
    site and the canonical op that replaces it (None where no proof was attempted). ``bias`` is what is added to the
    scores: none, row-constant, alibi, toeplitz, arbitrary, or unknown where the scores couldn't be looked at.
    """

    path: str
    kind: str
    verdict: str
    reason: str
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: str = "unknown"
    slopes: tuple[float, ...] | None = None
    padding: str | None = None
    packing: str = "none"
    max_error: float | None = None
    source: str = ""
    method: str = "softmax"
    details: dict[str, Any] = field(default_factory=dict)
    node: Node | None = field(default=None, repr=False, compare=False)
    near: Node | None = field(default=None, repr=False, compare=False)

    @property
    def proved(self) -> bool:
        """Whether the canonical op stands in the graph in place of this site."""
        return self.node is not None

    def record(self) -> dict[str, Any]:
        """The JSON-able description (`inspect --json`, manifest)."""
        names = (
            "path kind window heads kv_heads head_dim verdict reason max_error "
            "value_dim scale softcap bias slopes padding packing source method"
        )
        result = {name: getattr(self, name) for name in names.split()}
        if self.details:
            result["details"] = self.details
        return result


@dataclass
class Program:
    """A captured model.

    Attributes:
        graph_module: FX graph over ATen and ``lincompile::`` ops, batch and sequence dynamic; its parameters are
            the captured model's own (shared, not copied), under the model's own names.
        inputs: what the graph takes, in order.
        example: the inputs it was captured with.
        sites: every softmax attention, in graph order (filled by ``ProveAttention``).
        history: one entry per pass: name, options, whether it modified the graph, its report.
        max_positions: longest sequence the model accepts (None = not bounded by the graph).
        notes: things a user should know (an axis that had to be fixed, for example).
        conditions: on the inputs' sizes, as export writes them; where one fails, what was traced doesn't hold.
    """

    graph_module: GraphModule
    inputs: list[ProgramInput]
    example: dict[str, Tensor]
    sites: list[AttentionSite] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    max_positions: int | None = None
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Runs the graph. Inputs by position or by name; returns the model's tensor, or a tuple of them.

        Raises:
            LincompileError: an input is missing or unknown, or has a size that the captured graph isn't true of.
        """
        names = [item.name for item in self.inputs]
        unknown = set(kwargs) - set(names)
        if unknown or len(args) > len(names):
            raise LincompileError(
                f"the program takes {', '.join(names)}; got {', '.join(sorted(unknown)) or 'too many inputs'}"
            )
        values = dict(zip(names, args, strict=False)) | kwargs
        missing = [name for name in names if name not in values]
        if missing:
            raise LincompileError(f"the program needs the input '{missing[0]}' (it takes {', '.join(names)})")
        check_sizes(self, values)
        result = self.graph_module(*(values[name] for name in names))
        return result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result

    def site(self, path: str) -> AttentionSite:
        """The site at ``path``; an error that lists the paths if there is none."""
        for site in self.sites:
            if site.path == path:
                return site
        raise LincompileError(
            f"no attention site '{path}'; the sites are: {', '.join(s.path for s in self.sites) or 'none'}"
        )

    def site_of_op(self) -> dict[Node, AttentionSite]:
        """The attention ops in the graph and the sites they stand for: two at a site with a softmax window."""
        return {node: site for site in self.sites for node in (site.node, site.near) if node is not None}

    def input_with_role(self, role: str) -> ProgramInput | None:
        return next((item for item in self.inputs if item.role == role), None)

    def placeholder(self, name: str) -> Node:
        found: Node = next(n for n in self.graph_module.graph.nodes if n.op == "placeholder" and n.name == name)
        return found

    def bind(self, **axes: int) -> dict[str, int]:
        """Integers for every size symbol, given ``batch=``, ``sequence=`` and other axis names (default 2)."""
        binding: dict[str, int] = {}
        for item in self.inputs:
            fake = tensor_of(self.placeholder(item.name))
            for index, dim in enumerate(fake.shape):
                if is_symbolic(dim):
                    wanted = axes.get(item.axes.get(index, ""), 2)
                    free = symbols_in(dim)
                    if len(free) == 1:
                        binding[next(iter(free))] = wanted
        return binding

    @property
    def parameters(self) -> int:
        """Number of parameters (a tied tensor counts once)."""
        return sum(p.numel() for p in self.graph_module.parameters())

    def clone(self) -> Program:
        """A copy whose graph can be rewritten on its own; parameters and buffers stay shared."""
        memo: dict[int, Any] = {}
        module = share_tensors(self.graph_module, memo)
        modules = dict(self.graph_module.named_modules())
        nodes = {old.name: new for old, new in zip(self.graph_module.graph.nodes, module.graph.nodes, strict=True)}
        sites = []
        for site in self.sites:
            twin = copy.copy(site)
            twin.details = dict(site.details)
            twin.node = nodes[site.node.name] if site.node is not None else None
            twin.near = nodes[site.near.name] if site.near is not None else None
            name = site.details.get("module")
            # A GraphModule keeps what its graph reads of a submodule, not the submodule.
            if isinstance(name, str) and name in modules:
                module.set_submodule(name, copy.deepcopy(modules[name], memo))
            sites.append(twin)
        return Program(
            module,
            list(self.inputs),
            dict(self.example),
            sites,
            list(self.history),
            self.max_positions,
            list(self.notes),
            dict(self.metadata),
            list(self.conditions),
        )

    def print(self, tables: bool = False) -> None:
        """Prints the sites and the graph as text."""
        print(self.describe())
        if tables:
            self.graph_module.graph.print_tabular()
        else:
            print(self.graph_module.graph)

    def describe(self) -> str:
        lines = [
            f"program: {self.parameters:,} parameters, {len(self.graph_module.graph.nodes)} nodes, "
            f"{len(self.sites)} attention sites"
        ]
        for site in self.sites:
            shape = f"{site.heads}/{site.kv_heads} heads of {site.head_dim}" if site.heads else "shape unknown"
            window = f" window {site.window}" if site.window else ""
            lines.append(f"  {site.path}: {site.kind}{window}, {shape}, {site.method}, {site.verdict}: {site.reason}")
        return "\n".join(lines)

    def op_counts(self) -> dict[str, int]:
        """How often each op occurs, by name (for reports and before/after tests)."""
        counts: dict[str, int] = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "call_function":
                name = str(node.target)
                counts[name] = counts.get(name, 0) + 1
        return counts


# What the code of a condition may use.
NAMES = {"__builtins__": {"min": min, "max": max, "abs": abs}, "math": math, "torch": torch}


def holds(condition: str | CodeType, given: Mapping[str, Any]) -> bool:
    """Whether a condition of ``Program.conditions`` holds for inputs (anything with ``size()``) by name."""
    return bool(eval(condition, dict(NAMES), {"L": given}))


def readable(condition: str) -> str:
    """A condition as a user would write it: ``x.shape[1] <= 300``."""
    return re.sub(r"L\['([^']+)'\]\.size\(\)", r"\1.shape", condition)


def check_sizes(program: Program, values: Mapping[str, Tensor]) -> None:
    """Raises ``LincompileError`` where inputs have sizes that the captured graph isn't true of."""
    seen: dict[sympy.Expr, tuple[int, str, int]] = {}
    for item in program.inputs:
        wanted, sizes = tensor_of(program.placeholder(item.name)).shape, values[item.name].shape
        if len(wanted) != len(sizes):
            raise LincompileError(f"the input '{item.name}' has {len(sizes)} axes; the program takes {len(wanted)}")
        for axis, (dim, size) in enumerate(zip(wanted, sizes, strict=True)):
            expr = expression(dim)
            if expr.is_Integer and int(expr) != size:
                raise LincompileError(
                    f"the input '{item.name}' has {size} along axis {axis}; the program was captured for "
                    f"{expr} there, and holds for nothing else"
                )
            first, name, where = seen.setdefault(expr, (size, item.name, axis))
            if first != size and not (item.axes.get(axis) == "batch" and 1 in (first, size)):
                raise LincompileError(
                    f"the input '{item.name}' has {size} along axis {axis} and '{name}' {first} along axis {where}; "
                    "the example had one length for both, so the program does, too: give an example where they differ"
                )
    for condition in program.conditions:
        if not holds(condition, values):
            raise LincompileError(
                "inputs of these sizes take another path of the model: what was captured holds only where "
                f"{readable(condition)}"
            )


def share_tensors(module: GraphModule, memo: dict[int, Any]) -> GraphModule:
    """A copy of a graph module that shares every parameter, buffer and fake value with the original."""
    for tensor in [*module.parameters(), *module.buffers()]:
        memo[id(tensor)] = tensor
    root = copy.deepcopy(_plain_root(module), memo)
    graph = torch.fx.Graph()
    val_map: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, val_map)
    old_output = next(node for node in module.graph.nodes if node.op == "output")
    graph.output(output)
    for old, new in val_map.items():
        new.name = old.name
        new.meta = dict(old.meta)
    new_output = next(node for node in graph.nodes if node.op == "output")
    new_output.meta = dict(old_output.meta)
    return GraphModule(root, graph)


def _plain_root(module: GraphModule) -> nn.Module:
    """The graph module's tensors and submodules as a plain module tree (no graph attached)."""
    root = nn.Module()
    for name, child in module.named_children():
        root.add_module(name, child)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        root.register_parameter(name, parameter)
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        root.register_buffer(name, buffer, persistent=name in persistent)
    for name, value in vars(module).items():  # constants that aren't parameters or buffers
        if isinstance(value, Tensor):
            setattr(root, name, value)
    return root


def is_lincompile_op(node: Node, name: str) -> bool:
    """Whether ``node`` calls ``torch.ops.lincompile.<name>``."""
    target = target_of(node)
    return target is not None and str(target) == f"lincompile.{name}.default"


def content_nodes(program: Program) -> set[Node]:
    """Nodes that depend on tokens or features: not on positions, masks and sizes alone."""
    structural = {item.name for item in program.inputs if item.role in ("positions", "mask")}
    content: set[Node] = set()
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            if node.name not in structural:
                content.add(node)
        elif not is_symbolic(value_of(node)) and any(item in content for item in value_inputs(node)):
            content.add(node)
    return content
