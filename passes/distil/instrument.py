"""Training graphs: the teacher with the student's attention modules beside its softmax sites, or instead of them.

Training windows carry no padding, so padding masks are left out of the attention of both: fused softmax runs at full
speed and the student skips multiplications by one. (A mask that the model derives from its tokens stays.)
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import LincompileError
from ..graph import Builder, aten, finish, module_path, set_tensor, target_of, tensor_of
from ..inputs import model_values, settle
from ..linearization.methods import LinearMethod, method_class
from ..linearize import PROJECTIONS, find_operands
from ..program import Program, content_nodes, is_lincompile_op
from ..proof.match import CONTRACTIONS
from .regions import compile_regions, switch
from .spread import cut, exchanging, shift_positions

Wrap = Callable[[str, LinearMethod], nn.Module]
STAGES = "stages"  # in a student's metadata: checksums of what has trained it, in order


@dataclass
class TrainingGraph:
    """A graph to train on.

    Attributes:
        program: the instrumented program; its parameters are the teacher's own, its ``inputs`` the model's.
        branches: the student's attention modules by site path.
        autocast: dtype of the matrix products (None: the weights' own).
        modules: paths of the sites by the names under which the graph calls their modules.
    """

    program: Program
    branches: dict[str, LinearMethod]
    autocast: torch.dtype | None
    modules: dict[str, str] = field(default_factory=dict)
    divided: bool = False

    @property
    def graph_module(self) -> GraphModule:
        return self.program.graph_module

    @property
    def device(self) -> torch.device:
        return next(self.program.graph_module.parameters()).device

    def divide(self) -> None:
        """Makes what lies between the products compiled modules, for calls with ``compiled``."""
        if not self.divided:
            compile_regions(self.graph_module, self.autocast)
            self.divided = True

    def inputs(self, tokens: Tensor, repeats: Tensor | None = None) -> list[Tensor]:
        """What the graph takes for token windows ``[B, T]``."""
        return model_inputs(self.program, tokens) + ([] if repeats is None else [repeats])

    def __call__(self, tokens: Tensor, compiled: bool = False, repeats: Tensor | None = None) -> object:
        """Runs token windows ``[B, T]``; returns what the graph returns (for this rank's slice inside ``spread``).

        ``compiled``: by ``torch.compile`` what ``divide`` put aside, for this shape (some seconds at first).
        ``repeats``: as how many of itself each token counts, int64 ``[B, T]``, where the graph was made ``stretched``.
        """
        switch(self.graph_module, compiled)
        inputs = [cut(value) for value in self.inputs(tokens, repeats)]
        on = self.autocast is not None
        with exchanging(), torch.autocast(tokens.device.type, self.autocast or torch.bfloat16, enabled=on):
            return self.graph_module(*inputs)


def beside(teacher: Program, student: Program, wrap: Wrap, with_scores: bool = False) -> TrainingGraph:
    """The teacher up to its last attention site; beside each rewritten site ``wrap(path, student's module)``.

    The wrapped module is called with (the site's output, q, k, v, hidden states, and a padding mask where the model
    derives one from its tokens), and ``with_scores`` with the softmax's own q and k after its output; the graph returns
    the tuple of what these calls return.
    """
    return _instrument(teacher, student, wrap, instead=False, with_scores=with_scores)


def instead(teacher: Program, student: Program, wrap: Wrap | None = None, stretched: bool = False) -> TrainingGraph:
    """The student, its attention modules called as modules: computes what the student computes, on its parameters.

    ``stretched``: a last input, which may be left out, gives the modules their ``repeats``.
    """
    graph = _instrument(teacher, student, wrap or (lambda path, branch: branch), instead=True, stretched=stretched)
    own = dict(student.graph_module.named_parameters(remove_duplicate=False))
    module = graph.graph_module
    for name, _ in list(module.named_parameters(remove_duplicate=False)):
        if name in own:
            set_tensor(module, name, own[name])
    return graph


def either(teacher: Program, student: Program) -> tuple[TrainingGraph, dict[str, Switch]]:
    """The student with a switch at each rewritten site that sets it back to softmax."""
    switches: dict[str, Switch] = {}

    def wrap(path: str, branch: LinearMethod) -> nn.Module:
        switches[path] = Switch(branch)
        return switches[path]

    return _instrument(teacher, student, wrap, instead=True, with_softmax=True), switches


class Switch(nn.Module):
    """Passes on the softmax output it is given, or computes the linear attention."""

    def __init__(self, branch: LinearMethod) -> None:
        super().__init__()
        self.branch = branch
        self.softmax = False

    def forward(self, wanted: Tensor, *operands: Tensor) -> Tensor:
        result: Tensor = wanted if self.softmax else self.branch(*operands)
        return result


def unpadded(program: Program) -> TrainingGraph:
    """The program itself, for windows without padding."""
    twin, autocast, _ = _prepared(program)
    finish(twin.graph_module)
    return TrainingGraph(twin, {}, autocast)


def _instrument(
    teacher: Program,
    student: Program,
    wrap: Wrap,
    instead: bool,
    with_softmax: bool = False,
    with_scores: bool = False,
    stretched: bool = False,
) -> TrainingGraph:
    program, autocast, content = _prepared(teacher)
    module = program.graph_module
    named: dict[str, Any] = {}
    if stretched:
        with module.graph.inserting_after([node for node in module.graph.nodes if node.op == "placeholder"][-1]):
            named["repeats"] = module.graph.placeholder("repeats", default_value=None)
    branches: dict[str, LinearMethod] = {}
    modules: dict[str, str] = {}
    results: list[Node] = []
    for site, twin in zip(program.sites, student.sites, strict=True):
        if twin.method == "softmax" or site.node is None:
            continue
        branch = student.graph_module.get_submodule(twin.details["module"])
        assert isinstance(branch, LinearMethod)
        branches[site.path] = branch
        make = Builder(module, site.node)
        kept = twin.details["rotary"] == "kept"
        operands = find_operands(site, method_class(twin.method), make, content, branch.shape.window, kept)
        assert not isinstance(operands, str), operands
        if autocast is None:  # which casts what each op reads
            operands = operands.in_one_dtype(make)
        name = twin.details["module"]
        modules[name] = site.path
        module.add_submodule(name, wrap(site.path, branch))
        with module.graph.inserting_after(site.node):
            wanted: tuple[Any, ...] = (site.node,) if with_softmax or not instead else ()
            if with_scores:
                wanted += tuple(site.node.args[:2])
            if operands.mask not in content:
                operands = dataclasses.replace(operands, mask=None)
            call = module.graph.call_module(name, (*wanted, *operands.arguments()), named)
        call.meta["val"] = tensor_of(site.node)
        results.append(call)
        if instead:
            for user in [user for user in site.node.users if user is not call]:
                user.replace_input_with(site.node, call)
            if not with_softmax:
                module.graph.erase_node(site.node)
                site.node = None
    if not results:
        raise LincompileError("nothing to distil: no site was rewritten to a linear attention")
    if not instead:
        output = next(node for node in module.graph.nodes if node.op == "output")
        output.args = (tuple(results),)  # the head of the model isn't needed, and dead code goes
    finish(module)
    return TrainingGraph(program, branches, autocast, modules)


def _prepared(program: Program) -> tuple[Program, torch.dtype | None, set[Node]]:
    """A copy to train with, the dtype of its matrix products, and its content nodes."""
    settle(program)
    twin = program.clone()
    autocast = _autocast(twin)
    if (tokens := twin.input_with_role("tokens")) is not None:
        shift_positions(twin, tokens.name)
    content = content_nodes(twin)
    _simplify_softmax(twin, autocast, content)
    _keep_positions_exact(twin, autocast, content)
    return twin, autocast, content_nodes(twin)  # with the casts that were put in


class Exact:
    """An op that autocast leaves alone."""

    def __init__(self, op: Callable[..., Any], device: str) -> None:
        self.op, self.device = op, device
        self.__name__ = self.__qualname__ = f"exact_{getattr(op, '__name__', 'op')}".replace(".", "_")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device, enabled=False):
            return self.op(*args, **kwargs)


def _keep_positions_exact(program: Program, autocast: torch.dtype | None, content: set[Node]) -> None:
    """Products that no token enters stay in their own dtype.

    A rotary embedding's angles are a matrix product of positions and frequencies: in bfloat16, which counts no further
    than 256, they would be wrong, and every attention with them.
    """
    if autocast is None:
        return
    device = next(program.graph_module.parameters()).device.type
    for node in program.graph_module.graph.nodes:
        if target_of(node) in CONTRACTIONS | PROJECTIONS and node not in content:
            node.target = Exact(node.target, device)


def _autocast(program: Program) -> torch.dtype | None:
    """bfloat16 for a float32 model on a GPU; anything else computes in its own dtype, as does float64 attention."""
    if any(site.node is not None and tensor_of(site.node.args[2]).dtype == torch.float64 for site in program.sites):
        return None
    weights = [p for p in program.graph_module.parameters() if p.is_floating_point()]
    return torch.bfloat16 if weights and all(p.is_cuda and p.dtype == torch.float32 for p in weights) else None


def _simplify_softmax(program: Program, autocast: torch.dtype | None, content: set[Node]) -> None:
    """Drops the padding masks, and casts q, k and v (a rotary embedding leaves float32) so that SDPA can fuse."""
    module = program.graph_module
    parts = {site.node for site in program.sites if "part" in site.details}
    for node in [n for n in module.graph.nodes if is_lincompile_op(n, "softmax_attention")]:
        q, k, v, padding, *rest = node.args
        if autocast is not None:
            make = Builder(module, node)
            q, k, v = (_cast(make, item, autocast, node in parts) for item in (q, k, v))
        node.args = (q, k, v, padding if padding in content else None, *rest)


def _cast(make: Builder, operand: Node, dtype: torch.dtype, part: bool) -> Node:
    """The operand in ``dtype``; what ``SplitHeads`` cut is cast before the cut, so that ``whole`` finds the cut."""
    if not part:
        return make(aten.to.dtype, operand, dtype)
    source, *cut_at = operand.args
    return make(aten.slice.Tensor, make(aten.to.dtype, source, dtype), *cut_at)


@torch.no_grad()
def first_nonfinite(graph: TrainingGraph, tokens: Tensor, repeats: Tensor | None = None) -> str:
    """Path of the module in which token windows ``[B, T]`` first give NaN ("" if none does)."""

    paths = graph.modules

    class Watching(torch.fx.Interpreter):
        found = ""
        last = ""

        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            self.last = paths.get(str(n.target)) or module_path(n) or self.last
            values = result if isinstance(result, (tuple, list)) else [result]
            if not self.found and any(isinstance(v, Tensor) and bool(v.isnan().any()) for v in values):
                self.found = self.last
            return result

    switch(graph.graph_module, False)
    watching = Watching(graph.graph_module)
    on = graph.autocast is not None
    with torch.autocast(tokens.device.type, graph.autocast or torch.bfloat16, enabled=on):
        watching.run(*graph.inputs(tokens, repeats))
    return watching.found


def weights_checksum(program: Program) -> int:
    """CRC-32 of every parameter, so that a checkpoint isn't continued on another model."""
    return checksum(program.graph_module.parameters())


def run_of(stage: str, data: dict[str, Any], student: Program, teacher: Program | None) -> dict[str, Any]:
    """What tells one training run from another, JSON-able: its data, what its sites became, the teacher's weights, and
    what trained the student before.

    ``teacher`` is None where nothing is to be resumed: reading all weights takes seconds.
    """
    model = teacher and weights_checksum(teacher)
    run = {"stage": stage, "data": data, "sites": sites_of(student), "model": model}
    return run | ({"after": before} if (before := student.metadata.get(STAGES)) else {})


def add_stage(student: Program, *what: Any) -> None:
    """Notes what has trained a student (JSON-able): what comes after it is another run where this was another."""
    student.metadata[STAGES] = [*student.metadata.get(STAGES, []), zlib.crc32(json.dumps(what).encode())]


def sites_of(student: Program) -> list[list[Any]]:
    """What its sites became: ``[path, method, window, rotary, lowest]`` each, None where there is none. JSON-able."""
    made = ("window", "rotary", "lowest")
    return [[site.path, site.method, *map(site.details.get, made)] for site in student.sites]


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the tensors' bytes, one after the other."""
    total = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        total = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), total)
    return total


def model_inputs(program: Program, tokens: Tensor) -> list[Tensor]:
    """The program's inputs for unpadded token windows ``[B, T]``.

    Raises:
        LincompileError: the program takes something that tokens don't determine.
    """
    return list(model_values(program, tokens).values())
