"""Derives the step graph: one graph for prefill chunks and decode, with the attention states as inputs and outputs.

    step(tokens[B, t], positions[B, t], mask[B, t], *states) -> (output, *states)

Every op that mixes tokens must carry a state: linear attention its matrix, a short convolution its last inputs, a
kept softmax site its keys and values. Everything else must treat tokens one by one; that isn't taken on trust but
checked, by running the model in chunks (with and without left padding) against the full program.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .errors import RefusedError
from .graph import (
    Builder,
    argument,
    aten,
    expression,
    fake_mode_of,
    finish,
    redirect,
    target_of,
    tensor_of,
    value_of,
)
from .inputs import readers, reads_padding, settle, token_types
from .program import AttentionSite, Program
from .stepping.check import check_step
from .stepping.offsets import continue_positions, sequence_symbol
from .stepping.tokenwise import mixing
from .verify import op_name

ops = torch.ops.lincompile
GROWING_AXIS = {"key": 2, "value": 2, "mask": 1}  # by role: where a state, with its batch axis, grows


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of the step graph; the batch axis comes first and isn't in ``shape``.

    ``role``: ``recurrent`` ``[Hkv, D, Dv(+1)]``, ``conv`` ``[C, W−1]``, ``key`` or ``value`` ``[Hkv, None, D]``,
    ``mask`` ``[None]`` (bool, which cached keys are real; shared by all kept softmax sites). None grows with time.
    """

    name: str
    site: str
    role: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def empty(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """The state before the first token: zeros, of length 0 along the growing axis."""
        return torch.zeros(batch, *(0 if n is None else n for n in self.shape), dtype=self.dtype, device=device)

    def bytes(self, batch: int, tokens: int, window: int | None = None) -> int:
        """Size in bytes after ``tokens`` tokens (a sliding site keeps only its window)."""
        kept = tokens if window is None else min(tokens, window)
        count = 1
        for n in self.shape:
            count *= kept if n is None else n
        return batch * count * self.dtype.itemsize


@dataclass
class StepProgram:
    """The step graph, its states, and what the runtime must know about the model.

    Attributes:
        graph_module: ``(tokens, positions, mask, *states) -> (output, *states)``.
        states: specs in argument order.
        windows: window of each sliding softmax site (its cache may be trimmed to that many tokens), by site path.
        max_positions: longest sequence the model accepts, None if unbounded.
        uniform_positions: the model counts positions itself, so all rows of a batch must be at the same position.
        causal: False for the whole-sequence form of a bidirectional model: no states, each call is a full forward.
        max_error: largest relative difference against the full program in the check (None: not run, no weights).
    """

    graph_module: GraphModule
    states: list[StateSpec]
    windows: dict[str, int] = field(default_factory=dict)
    max_positions: int | None = None
    uniform_positions: bool = False
    causal: bool = True
    max_error: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step. Returns the output and the new states."""
        result = self.graph_module(tokens, positions, mask, *states)
        return result[0], list(result[1:])

    def initial_states(self, batch: int, device: torch.device | str = "cpu") -> list[Tensor]:
        return [spec.empty(batch, device) for spec in self.states]

    def limit(self, spec: StateSpec) -> int | None:
        """How many tokens of a growing state any later query can see; None: all of them."""
        return visible_tokens(spec, self.states, self.windows)

    def trim(self, spec: StateSpec, state: Tensor) -> Tensor:
        """Drops what no later query of a sliding site can see from its cached keys, values, and their mask."""
        return trimmed(spec.role, self.limit(spec), state)

    def state_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of all states after ``tokens`` tokens."""
        return sum(spec.bytes(batch, tokens, self.limit(spec)) for spec in self.states)


def visible_tokens(spec: StateSpec, specs: Sequence[StateSpec], windows: dict[str, int]) -> int | None:
    """How many tokens of the growing state ``spec`` a later query can see, given the sliding sites' ``windows``."""
    if spec.role != "mask":
        return windows.get(spec.site)
    keys = {other.site for other in specs if other.role == "key"}
    return max(windows[site] for site in keys) if keys <= windows.keys() else None


def trimmed(role: str, limit: int | None, state: Tensor) -> Tensor:
    """The last ``limit`` tokens of a growing state (None: all); other states as they are."""
    axis = GROWING_AXIS.get(role)
    if axis is None or limit is None or state.shape[axis] <= limit:
        return state
    return state.narrow(axis, state.shape[axis] - limit, limit)


def make_stateful(program: Program, *, check: bool = True) -> StepProgram:
    """The step form of a causal program. The program itself is left as it is.

    Args:
        check: run the step graph in chunks against the full program and refuse a difference above 1e-4 (relative).

    Raises:
        RefusedError: the model has an unproved or bidirectional attention, mixes tokens elsewhere, or counts
            positions in a way that can't be continued, or lets the rows of a batch influence one another; the
            message names the node.
    """
    if program.metadata.get("sequence_parallel"):
        raise RefusedError("no step form: the program is sharded; make the step program first, then shard_step")
    blockers = [site for site in program.sites if site.node is None]
    if blockers:
        raise RefusedError(f"no step form: the attention at '{blockers[0].path}' isn't proved ({blockers[0].reason})")
    tokens = program.input_with_role("tokens") or program.input_with_role("features")
    if tokens is None or "sequence" not in "".join(tokens.axes.values()):
        raise RefusedError("no step form: the model takes no token sequence with a dynamic length")
    reason = mixing(program, sequence_symbol(program.placeholder(tokens.name)))
    if reason is not None:
        raise RefusedError(f"no step form: {reason}")
    settle(program)
    twin = program.clone()
    stepper = _Stepper(twin, tokens.name)
    step = stepper.build()
    if check and not any(t.is_meta for t in twin.graph_module.parameters()):
        step.max_error = check_step(program, step, tokens.name)
    return step


def make_full(program: Program) -> StepProgram:
    """The whole-sequence form of a model that has no step form: the same signature, without states.

    Token types, where the model takes them, are 0: one segment.

    Raises:
        RefusedError: the model takes something other than tokens, a mask, positions and token types, or a mask of which
            it isn't known what 1 means.
    """
    tokens = program.input_with_role("tokens")
    if tokens is None:
        raise RefusedError(
            "the model takes no tokens, so it has no program to save; use it from Python (compiled.program)"
        )
    settle(program)
    return _Stepper(program.clone(), tokens.name).build_full()


class _Stepper:
    """Turns one cloned program into its step graph, in place."""

    def __init__(self, program: Program, tokens: str) -> None:
        self.program = program
        self.module = program.graph_module
        self.graph = self.module.graph
        self.tokens = program.placeholder(tokens)
        self.sequence = sequence_symbol(self.tokens)
        self.specs: list[StateSpec] = []
        self.state_inputs: list[Node] = []
        self.state_outputs: list[Node] = []
        self.windows: dict[str, int] = {}
        self.key_mask: Node | None = None
        self.past: Any = None

    def build(self) -> StepProgram:
        self.last_input = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        batch, length = tensor_of(self.tokens).shape[:2]
        self.mask = self._input("step_mask", (batch, length), torch.bool)
        self.positions = self._input("step_positions", (batch, length), torch.int64)
        uniform = continue_positions(self.program, self.sequence, self._offset)
        sites = self.program.site_of_op()
        if any(op_name(node) == "softmax_attention" for node in self.graph.nodes):
            self._shared_key_mask()
        conv_site = self._site_of_convs(sites)
        for node in list(self.graph.nodes):
            name = op_name(node)
            if name in ("linear_attention", "gated_delta"):
                self._recurrent(node, sites[node], name)
            elif name == "short_conv":
                self._conv(node, conv_site[node])
            elif name == "softmax_attention":
                self._softmax(node, sites[node])
        self._rewire_inputs()
        self._outputs()
        finish(self.module)
        return StepProgram(
            self.module,
            self.specs,
            self.windows,
            self.program.max_positions,
            uniform,
            metadata=dict(self.program.metadata),
        )

    def build_full(self) -> StepProgram:
        """Only renames the inputs to the step signature."""
        self.last_input = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        batch, length = tensor_of(self.tokens).shape[:2]
        self.mask = self._input("step_mask", (batch, length), torch.bool)
        self.positions = self._input("step_positions", (batch, length), torch.int64)
        types, kept = token_types(self.program), []
        for item in self.program.inputs:
            node = self.program.placeholder(item.name)
            if node is self.tokens:
                kept.append(item)
                continue
            unread = not readers(self.program, item.name) and tensor_of(node).shape == tensor_of(self.tokens).shape
            if item.name in types or unread:
                anchor = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
                dtype = tensor_of(node).dtype
                redirect(node, Builder(self.module, anchor)(aten.zeros_like.default, self.tokens, dtype=dtype))
            if not node.users:
                self.graph.erase_node(node)
            else:
                kept.append(item)
        self.program.inputs = kept
        self._rewire_inputs(
            "",
            "an artefact can't give (it has tokens, positions and a padding mask): give it a fixed value in a module "
            "around the model",
        )
        self._outputs()
        finish(self.module)
        return StepProgram(
            self.module, [], {}, self.program.max_positions, causal=False, metadata=dict(self.program.metadata)
        )

    def _input(self, name: str, shape: Sequence[Any], dtype: torch.dtype) -> Node:
        with self.graph.inserting_after(self.last_input):
            node = self.graph.placeholder(name)
        with fake_mode_of(self.module):
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=tensor_of(self.tokens).device)
        self.last_input = node
        return node

    def _state(self, site: AttentionSite, role: str, name: str, shape: Sequence[Any], dtype: torch.dtype) -> Node:
        batch = tensor_of(self.tokens).shape[0]
        node = self._input(name, (batch, *shape), dtype)
        fixed = tuple(int(expression(n)) if expression(n).is_Integer else None for n in shape)
        self.specs.append(StateSpec(name, site.path, role, fixed, dtype))
        self.state_inputs.append(node)
        return node

    def _index(self, site: AttentionSite) -> int:
        return self.program.sites.index(site)

    def _growing(self) -> Any:
        """The size symbol of the caches' lengths, one for all of them."""
        if self.past is None:
            self.past = fresh_size(fake_mode_of(self.module).shape_env)
        return self.past

    # ---- sites

    def _real(self, make: Builder, value: Any, axes: tuple[int, ...]) -> Node:
        """``value`` with padded tokens zeroed; ``axes`` are where the mask gets axes of length one."""
        mask = make(aten.to.dtype, self.mask, tensor_of(value).dtype)
        for axis in axes:
            mask = make(aten.unsqueeze.default, mask, axis)
        return make(aten.mul.Tensor, value, mask)

    def _recurrent(self, node: Node, site: AttentionSite, name: str) -> None:
        if name == "linear_attention" and not argument(node, 6, "causal"):
            raise RefusedError(f"no step form: the attention at '{site.path}' is bidirectional")
        make = Builder(self.module, node)
        q, k, v = node.args[:3]
        columns = tensor_of(v).shape[3] + (1 if name == "linear_attention" and argument(node, 7, "normalize") else 0)
        shape = (tensor_of(k).shape[1], tensor_of(k).shape[3], columns)
        dtype = torch.float64 if tensor_of(q).dtype == torch.float64 else torch.float32
        state = self._state(site, "recurrent", f"site{self._index(site)}_recurrent", shape, dtype)
        args = list(node.args)
        if not self.masked:
            args[1] = self._real(make, k, (1, 3))
            decay = 3 if name == "linear_attention" else 4
            if args[decay] is not None:
                args[decay] = self._real(make, args[decay], (1, 3))
            if name == "gated_delta":
                args[3] = self._real(make, args[3], (1,))
        args[4 if name == "linear_attention" else 5] = state
        node.args = tuple(args)
        with self.graph.inserting_after(node):
            final = self.graph.call_function(operator.getitem, (node, 1))
        final.meta["val"] = value_of(node)[1]
        self.state_outputs.append(final)

    def _conv(self, node: Node, site: AttentionSite) -> None:
        make = Builder(self.module, node)
        x, weight = node.args[:2]
        shape = (tensor_of(weight).shape[0], tensor_of(weight).shape[1] - 1)
        number = sum(spec.role == "conv" and spec.site == site.path for spec in self.specs)
        state = self._state(site, "conv", f"site{self._index(site)}_conv{number}", shape, tensor_of(x).dtype)
        node.args = (x if self.masked else self._real(make, x, (2,)), weight, state)
        with self.graph.inserting_after(node):
            final = self.graph.call_function(operator.getitem, (node, 1))
        final.meta["val"] = value_of(node)[1]
        self.state_outputs.append(final)

    def _site_of_convs(self, sites: dict[Node, AttentionSite]) -> dict[Node, AttentionSite]:
        """Which site each short convolution feeds: the first attention below it."""
        result: dict[Node, AttentionSite] = {}
        for node in self.graph.nodes:
            if op_name(node) != "short_conv":
                continue
            pending, seen = list(node.users), set()
            while pending:
                user = pending.pop(0)
                if user in sites:
                    result[node] = sites[user]
                    break
                if user not in seen:
                    seen.add(user)
                    pending.extend(user.users)
        return result

    def _shared_key_mask(self) -> None:
        first = next(node for node in self.graph.nodes if op_name(node) == "softmax_attention")
        site = self.program.site_of_op()[first]
        batch = tensor_of(self.tokens).shape[0]
        past = self._input("key_mask", (batch, self._growing()), torch.bool)
        self.specs.append(StateSpec("key_mask", site.path, "mask", (None,), torch.bool))
        self.state_inputs.append(past)
        anchor = next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))
        self.key_mask = Builder(self.module, anchor)(aten.cat.default, [past, self.mask], 1)
        self.state_outputs.append(self.key_mask)

    def _softmax(self, node: Node, site: AttentionSite) -> None:
        kind, window, scale, softcap = (
            argument(node, i, n) for i, n in ((4, "kind"), (5, "window"), (6, "scale"), (7, "softcap"))
        )
        if kind == "full":
            raise RefusedError(f"no step form: the attention at '{site.path}' is bidirectional")
        make = Builder(self.module, node)
        q, k, v = node.args[:3]
        heads, width, columns = tensor_of(k).shape[1], tensor_of(k).shape[3], tensor_of(v).shape[3]
        index = self._index(site)
        keys = self._state(site, "key", f"site{index}_key", (heads, self._growing(), width), tensor_of(k).dtype)
        values = self._state(site, "value", f"site{index}_value", (heads, self._growing(), columns), tensor_of(v).dtype)
        out = make(
            ops.softmax_attention_step.default, q, k, v, keys, values, self.key_mask, kind, window, scale, softcap
        )
        result, new_keys, new_values = (make.item(out, i) for i in range(3))
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)
        self.state_outputs += [new_keys, new_values]
        if kind == "sliding":
            self.windows[site.path] = window

    # ---- inputs

    def _offset(self) -> Node:
        """The first row's first position: where counters start."""
        anchor = next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))
        make = Builder(self.module, anchor)
        return make(aten.select.int, make(aten.select.int, self.positions, 0, 0), 0, 0)

    @property
    def masked(self) -> bool:
        """Whether the model reads a padding mask itself (its linear sites are then masked already)."""
        return reads_padding(self.program)

    def _rewire_inputs(self, prefix: str = "no step form: ", unknown: str = "has no meaning token by token") -> None:
        """The model's own mask and position inputs become ``step_mask`` and ``step_positions``; others are refused."""
        for item in self.program.inputs:
            if item.name == self.tokens.name:
                continue
            node = self.program.placeholder(item.name)
            source = {"mask": self.mask, "positions": self.positions}.get(item.role)
            if source is None or (item.role == "positions" and tensor_of(node).dim() != 2):
                raise RefusedError(f"{prefix}the model also takes '{item.name}', which {unknown}")
            if item.problem:
                raise RefusedError(f"{prefix}{item.problem}")
            if node.users:
                self._replace_input(node, source, bool(item.inverted))
            self.graph.erase_node(node)

    def _replace_input(self, node: Node, source: Node, inverted: bool) -> None:
        make = Builder(self.module, next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")))
        if inverted:
            for user in list(node.users):
                if target_of(user) is aten.eq.Scalar and user.args[1] == 0:  # what proved attention masks by
                    redirect(user, source)
                    self.graph.erase_node(user)
            if not node.users:
                return
            source = make(aten.logical_not.default, source)
        dtype = tensor_of(node).dtype
        redirect(node, source if dtype == tensor_of(source).dtype else make(aten.to.dtype, source, dtype))

    def _outputs(self) -> None:
        output = next(node for node in self.graph.nodes if node.op == "output")
        results: list[Node] = []
        torch.fx.map_arg(output.args, results.append)
        if not results:
            raise RefusedError("no step form: the model returns no tensor")
        # states in argument order: inputs were inserted in the order their sites were met, as were the outputs
        output.args = ((results[0], *self.state_outputs),)
        ordered = [self.tokens, self.positions, self.mask, *self.state_inputs]
        self._reorder(ordered)
        for node, name in zip(ordered[:3], ("tokens", "positions", "mask"), strict=True):
            node.target = name
            node.name = name
            node._rename(name) if node.name != name else None

    def _reorder(self, ordered: list[Node]) -> None:
        first = next(iter(self.graph.nodes))
        for node in ordered:
            if node is not first:
                first.prepend(node)
            else:
                first = first.next


def fresh_size(shape_env: Any) -> Any:
    """A new size symbol, with 6 as the example it stands for (2 and more would do: 0 and 1 are special)."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    symbol = shape_env.create_symbol(6, ConstantSource("past_length"), dynamic_dim=DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=6)
