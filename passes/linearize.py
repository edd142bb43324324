"""Replaces proved softmax sites by a linear attention: finds its operands, inlines the method's graph, records why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .errors import LincompileError, RefusedError
from .graph import (
    Builder,
    aten,
    expression,
    finish,
    same_dim,
    symbols_in,
    target_of,
    tensor_of,
    uncached_fakes,
    value_of,
)
from .linearization.alibi import AlibiGLA, AlibiShape, decays, errors, without_positions
from .linearization.methods import LOWEST, LinearMethod, SiteShape, method_class
from .pipeline import PassResult, register
from .program import AttentionSite, Program, content_nodes
from .split_heads import parse_head_count, parse_heads, whole

MODULE_PREFIX = "lincompile_attention"
PROJECTIONS = frozenset(
    {aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default, torch.ops.aten.conv1d.default}
)
# Ops a rotary embedding is made of; anything else above q or k (a projection, a norm) ends the search.
ROTARY_OPS = frozenset(
    {
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.neg.default,
        aten.cat.default,
        aten.stack.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.type_as.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
        aten.expand.default,
    }
)


def check_floor(lowest: float | None) -> None:
    """Raises ``LincompileError`` for what can't be a floor of log-decays."""
    if lowest is not None and not lowest < 0:
        raise LincompileError(f"log-decays are at most 0, so lowest={lowest} must be below 0 (None = no floor)")


@register("linearize")
@dataclass(frozen=True)
class LinearizeAttention:
    """Rewrites proved sites to a linear attention.

    Args:
        attn: gla, hedgehog, lawcat, gated-delta, or softmax (rewrite nothing).
        keep: sites that stay softmax, by index (0 = the first); or one number as a count, see ``count``.
        count: keep this many sites softmax, evenly spaced (0 = none).
        sliding: also rewrite sliding-window sites (by default they keep their window: already linear in length).
        window: mix in softmax attention to this many of the nearest keys (0 = none); the keys' cache stays that long.
        seed: for the gates' small random weights.
        rotary: "keep" lets the method read q and k after the rotary embedding, "remove" before it; "" is the method's
            own way (hedgehog keeps it; the gated methods, whose decay says how far back a key lies, remove it).
        lowest: floor of gla's and lawcat's log-decays per token (None = no floor, as in students made before there was
            one). It is a part of what is trained: an adapter says with which it was.

    A site that can't be rewritten (refused by the prover, cross-attention, bidirectional with a causal method) stays
    as it is, with the reason in its record.
    """

    attn: str = "lawcat"
    keep: tuple[int, ...] = ()
    count: int = 0
    sliding: bool = False
    window: int = 0
    seed: int = 0
    rotary: str = ""
    lowest: float | None = LOWEST
    name: str = field(default="linearize", init=False, metadata={"text": False})

    def __post_init__(self) -> None:
        if self.window < 0:
            raise LincompileError(f"--window {self.window}: write a number of tokens, such as 64 (0 = none)")
        if self.rotary not in ("", "keep", "remove"):
            raise LincompileError(f"--rotary {self.rotary}: the choices are keep and remove")
        check_floor(self.lowest)

    def run(self, program: Program) -> PassResult:
        if self.attn == "softmax":
            return PassResult(program, False, {"rewritten": 0})
        kept = self.kept_sites(program)
        traces: dict[Any, Trace] = {}
        content = content_nodes(program)
        rewritten = 0
        for index, site in enumerate(program.sites):
            if site.node is None or site.method != "softmax":
                continue
            reason = self.reason_to_keep(site, index, kept)
            if reason is None:
                reason = self.rewrite(program, site, index, traces, content)
            if reason is not None:
                site.verdict, site.reason = "keep", reason
            else:
                rewritten += 1
        finish(program.graph_module)
        added = sum(p.numel() for name, p in program.graph_module.named_parameters() if name.startswith(MODULE_PREFIX))
        report = {
            "rewritten": rewritten,
            "kept": {s.path: s.reason for s in program.sites if s.verdict != "rewrite"},
            "parameters_added": added,
        }
        return PassResult(program, rewritten > 0, report)

    def kept_sites(self, program: Program) -> set[int]:
        number = len(program.sites)
        wrong = [i for i in self.keep if not -number <= i < number]
        if wrong:
            raise RefusedError(f"--keep-softmax {wrong[0]}: the model has {number} attention sites (0 to {number - 1})")
        chosen = {i % number for i in self.keep}
        if self.count:
            if self.count > number:
                raise RefusedError(f"--keep-softmax {self.count}: the model has only {number} attention sites")
            chosen |= {round((i + 0.5) * number / self.count - 0.5) for i in range(self.count)}
        return chosen

    def reason_to_keep(self, site: AttentionSite, index: int, kept: set[int]) -> str | None:
        cls = method_class(self.attn)
        assert site.node is not None
        if index in kept:
            return "kept softmax on request"
        if site.kind == "sliding" and not self.sliding:
            return (
                f"a sliding window of {site.window} keeps constant memory as it is (rewrite it with --rewrite-sliding)"
            )
        if site.kind == "full" and not cls.bidirectional:
            return f"bidirectional attention; {self.attn} is causal (use --attn hedgehog)"
        if site.kind == "full" and self.window:
            return "bidirectional attention; --window mixes in a causal window"
        q, k = tensor_of(site.node.args[0]), tensor_of(site.node.args[1])
        if not same_dim(q.shape[2], k.shape[2]):
            return "cross-attention between two sequences stays softmax"
        return self.reason_to_keep_alibi(site) if site.bias == "alibi" else None

    def reason_to_keep_alibi(self, site: AttentionSite) -> str | None:
        """Why a site with ALiBi stays softmax (exactly, its bias included); None where its slopes become decays."""
        assert site.slopes is not None and site.kv_heads is not None
        if self.attn != "gla":
            return f"ALiBi's slopes are decays in gla only, not in {self.attn}; it stays softmax with its bias"
        if self.window:
            return "--window isn't combined with ALiBi; it stays softmax with its bias"
        found = decays(site.slopes, site.kv_heads)
        return found if isinstance(found, str) else None

    def rewrite(
        self, program: Program, site: AttentionSite, index: int, traces: dict[Any, Trace], content: set[Node]
    ) -> str | None:
        """Replaces one site; returns the reason if it can't be."""
        node = site.node
        assert node is not None
        cls = method_class(self.attn)
        module = program.graph_module
        make = Builder(module, node)
        keep = cls.rotary if not self.rotary else self.rotary == "keep"
        operands = find_operands(site, cls, make, content, self.window, keep)
        if isinstance(operands, str):
            return operands
        operands = operands.in_one_dtype(make)
        shape_class: Callable[..., SiteShape] = SiteShape
        if site.bias == "alibi":
            assert site.slopes is not None and site.kv_heads is not None
            slopes = decays(site.slopes, site.kv_heads)
            assert isinstance(slopes, tuple), "reason_to_keep_alibi let only decays through"
            cls, shape_class = AlibiGLA, partial(AlibiShape, slopes=slopes)
        hidden, mask = operands.hidden, operands.mask
        dtype, device = tensor_of(operands.v).dtype, tensor_of(operands.v).device
        width = int(tensor_of(hidden).shape[-1]) if hidden is not None else 1
        assert site.heads and site.kv_heads and site.head_dim and site.value_dim and site.scale
        shape = shape_class(
            site.heads,
            site.kv_heads,
            site.head_dim,
            site.value_dim,
            width,
            site.scale,
            site.kind != "full",
            min(self.window, site.window or self.window),
            site.softcap or 0.0,
            self.lowest,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 100_003 + index)
            method = cls(shape).to(dtype)
        method = method.to(device)
        key = (shape, self.attn, mask is not None, dtype)
        if key not in traces:
            traces[key] = trace_method(cls(shape).to(dtype), mask is not None)
        name = f"{MODULE_PREFIX}.{index}"
        module.add_submodule(name, method)
        output, op, near = inline(traces[key], operands.arguments(), make, name, method)
        node.replace_all_uses_with(output)
        module.graph.erase_node(node)
        site.node, site.near, site.method = op, near, self.attn
        if shape.window:
            site.details["window"] = shape.window
        site.details["module"] = name
        if isinstance(method, AlibiGLA):
            site.details["alibi_error"] = errors(method)
        site.details["rotary"] = operands.rotary
        if method.floored and shape.lowest is not None:
            site.details["lowest"] = shape.lowest
        beside = f" beside a softmax window of {shape.window}" if shape.window else ""
        site.reason = f"softmax proved to {site.max_error:.1e}, rewritten to {self.attn}{beside}"
        return None


@dataclass(frozen=True)
class Operands:
    """What a method reads at one site: nodes for q, k, v, the hidden states (None if unused) and the padding mask.

    ``near``: the site's own q and k, where softmax over a window is mixed in. ``rotary``: whether the rotary embedding
    was "kept" or "removed", or there is "none".
    """

    q: Node
    k: Node
    v: Node
    hidden: Node | None
    mask: Node | None
    rotary: str
    near: tuple[Node, ...] = ()

    def arguments(self) -> list[Node]:
        """In the order of ``LinearMethod.forward``; v stands in for hidden states that the method doesn't read."""
        mask = [self.mask] if self.mask is not None else []
        return [self.q, self.k, self.v, self.hidden or self.v, *self.near, *mask]

    def in_one_dtype(self, make: Builder) -> Operands:
        """All in v's dtype, the method's own: where attention runs in another than the model, the others may not be."""
        dtype = tensor_of(self.v).dtype

        def cast(node: Node) -> Node:
            return node if tensor_of(node).dtype == dtype else make(aten.to.dtype, node, dtype)

        hidden = None if self.hidden is None else cast(self.hidden)
        return replace(self, q=cast(self.q), k=cast(self.k), hidden=hidden, near=tuple(map(cast, self.near)))


def find_operands(
    site: AttentionSite,
    cls: type[LinearMethod],
    make: Builder,
    content: set[Node],
    window: int = 0,
    rotary: bool | None = None,
) -> Operands | str:
    """The operands of ``cls`` at a proved softmax site, or the reason why they can't be had.

    Args:
        rotary: whether q and k are read after their rotary embedding; None = as the method has it.
    """
    assert site.node is not None
    q, k, v, mask = site.node.args[:4]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    padding = mask if isinstance(mask, Node) else None
    if site.bias == "alibi":  # its slopes are the decays, so no gate reads hidden states
        return Operands(*without_positions(q, k), v, None, padding, "none")
    hidden = hidden_states(k, q, make, content)
    if hidden is None and (cls.gated or window):
        what = cls.method if cls.gated else "--window"
        return f"{what} needs the hidden states that k is projected from, and no projection was found above k"
    kept = cls.rotary if rotary is None else rotary
    near = (q, k) if window else ()
    if not any(_tables(x, content) for x in (q, k)):
        return Operands(q, k, v, hidden, padding, "none", near)
    if kept:
        return Operands(q, k, v, hidden, padding, "kept", near)
    before: list[Node] = []
    for operand in (q, k):
        source, heads = whole(site, operand)
        found = pre_rotary(source, make, content)
        if isinstance(found, str):
            return f"{cls.method} reads q and k before their positions, but {found} (--rotary keep reads them after)"
        before.append(found if heads is None else make(aten.slice.Tensor, found, 1, *heads))
    return Operands(before[0], before[1], v, hidden, padding, "removed", near)


@dataclass
class Trace:
    """A method's ATen graph, and the fake values its nodes had in the program, by operand shapes."""

    graph: GraphModule
    values: dict[str, dict[Node, Any]] = field(default_factory=dict)


def trace_method(method: LinearMethod, padded: bool) -> Trace:
    """The method's forward as an ATen graph, with dynamic batch and sequence."""
    shape = method.shape
    dtype = next(method.parameters()).dtype
    batch, length = 2, 5
    example: list[Tensor] = [
        torch.zeros(batch, shape.heads, length, shape.head_dim, dtype=dtype),
        torch.zeros(batch, shape.kv_heads, length, shape.head_dim, dtype=dtype),
        torch.zeros(batch, shape.kv_heads, length, shape.value_dim, dtype=dtype),
        torch.zeros(batch, length, shape.hidden, dtype=dtype),
    ]
    # AUTO, not named axes: torch 2.11 refuses those over a guard it can't decide (min(128 t, 384 t) == 128 t)
    b = t = torch.export.Dim.AUTO
    shapes: list[Any] = [{0: b, 2: t}, {0: b, 2: t}, {0: b, 2: t}, {0: b, 1: t}]
    rest: list[Any] = []  # the shapes of ``*rest``: a tuple of their own
    if shape.window:
        example += [torch.zeros_like(example[0]), torch.zeros_like(example[1])]
        rest += shapes[:2]
    if padded:
        example.append(torch.ones(batch, length, dtype=torch.bool))
        rest.append({0: b, 1: t})
    shapes += [tuple(rest)] if rest else []
    with uncached_fakes():
        exported = torch.export.export(method, tuple(example), dynamic_shapes=tuple(shapes), strict=False)
    traced = exported.module(check_guards=False)
    from .canonicalize import remove_noops

    assert isinstance(traced, GraphModule)
    remove_noops(traced)
    return Trace(traced)


def inline(
    traced: Trace, operands: Sequence[Node], make: Builder, name: str, method: LinearMethod
) -> tuple[Node, Node, Node | None]:
    """Copies a traced method's graph before the builder's anchor.

    Returns (its output, its linear attention's node, its softmax window's node).

    Sites with operands of the same shapes share the fake values that the first of them computed.
    """
    values = traced.values.setdefault(str([tuple(tensor_of(item).shape) for item in operands]), {})
    mapping: dict[Node, Any] = {}
    inputs = iter(operands)
    op: Node | None = None
    near: Node | None = None
    for node in traced.graph.graph.nodes:
        if node.op == "placeholder":
            mapping[node] = next(inputs)
        elif node.op == "get_attr":
            target = str(node.target)
            mapping[node] = make.attribute(f"{name}.{target}", method.get_parameter(target), values.get(node))
            values[node] = value_of(mapping[node])
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda item: mapping[item])
            mapping[node] = (
                make.insert(node.target, args, kwargs, values[node])
                if node in values
                else make(node.target, *args, **kwargs)
            )
            values[node] = value_of(mapping[node])
            if str(node.target).startswith(("lincompile.linear_attention", "lincompile.gated_delta")):
                op = mapping[node]
            elif str(node.target).startswith("lincompile.softmax_attention"):
                near = mapping[node]
    output = next(node for node in traced.graph.graph.nodes if node.op == "output").args[0]
    result = mapping[output[0] if isinstance(output, (tuple, list)) else output]
    assert op is not None, "a method has exactly one attention op"
    return result, op, near


def pre_rotary(operand: Node, make: Builder, content: set[Node]) -> Node | str:
    """Q or k before its rotary embedding, as ``[B, heads, T, D]``; the operand itself where positions don't enter it.

    Walks up through the ops a rotary embedding is made of, until one node carries everything that came from the
    hidden states; position tables (cos, sin) met on the way show that there was an embedding. ``content`` are the
    nodes that depend on tokens or features.

    Returns:
        The node, or how positions enter where the embedding can't be taken off.
    """
    order = {node: index for index, node in enumerate(operand.graph.nodes)}
    if not (tables := _tables(operand, content)):
        return operand
    frontier = {operand}
    while frontier:
        current = max(frontier, key=order.__getitem__)
        if target_of(current) not in ROTARY_OPS and getattr(target_of(current), "__name__", "") != "getitem":
            return (
                f"positions enter above '{current.name}' ({target_of(current)}), which no rotary embedding is made of"
            )
        frontier.remove(current)
        tables -= set(current.all_input_nodes)
        frontier |= {item for item in current.all_input_nodes if item in content}
        if len(frontier) == 1 and not tables:
            found = _heads_first(next(iter(frontier)), operand, make)
            if found is not None:
                return found
    return f"what '{operand.name}' is before its positions has another shape"


def _tables(operand: Node, content: set[Node]) -> set[Node]:
    """Tensors that don't depend on tokens but differ along the sequence and enter ``operand`` below its projection."""
    time = symbols_in(tensor_of(operand).shape[2])
    found: set[Node] = set()
    pending, seen = [operand], set()
    while pending:
        node = pending.pop()
        if node in seen or (target_of(node) in PROJECTIONS and _has_weight(node)):
            continue
        seen.add(node)
        for item in node.all_input_nodes:
            if item in content:
                pending.append(item)
            elif isinstance(value_of(item), Tensor) and symbols_in(value_of(item)) & time:
                found.add(item)
    return found


def _heads_first(node: Node, like: Node, make: Builder | None) -> Node | None:
    """``node`` as ``[B, heads, T, D]`` if it has those axes (in that order or ``[B, T, heads, D]``)."""
    value, wanted = value_of(node), tensor_of(like).shape
    if not isinstance(value, Tensor) or value.dim() != 4 or value.is_complex():
        return None
    if all(same_dim(a, b) for a, b in zip(value.shape, wanted, strict=True)):
        return node
    swapped = (wanted[0], wanted[2], wanted[1], wanted[3])
    if all(same_dim(a, b) for a, b in zip(value.shape, swapped, strict=True)):
        return node if make is None else make(aten.transpose.int, node, 1, 2)
    return None


def hidden_states(k: Node, q: Node, make: Builder, content: set[Node]) -> Node | None:
    """The hidden states ``[B, T, C]`` that ``k`` is projected from: the input of the nearest projection above it.

    Only what depends on ``content`` counts: the angles of a rotary embedding are a product with stored numbers, too.
    """
    batch, _, time, _ = tensor_of(q).shape
    pending, seen = [k], set()
    while pending:
        node = pending.pop(0)
        if node in seen or not isinstance(value_of(node), (Tensor, list, tuple)):
            continue
        seen.add(node)
        if target_of(node) in PROJECTIONS and _has_weight(node):
            position = 1 if target_of(node) is aten.addmm.default else 0
            source = node.args[position]
            assert isinstance(source, Node)
            return _batch_first(source, batch, time, make)
        pending.extend(item for item in node.all_input_nodes if item in content)
    return None


def _has_weight(node: Node) -> bool:
    others = node.args[2:] if target_of(node) is aten.addmm.default else node.args[1:]
    weight = others[0] if others else None
    while isinstance(weight, Node) and weight.op == "call_function" and len(weight.all_input_nodes) == 1:
        weight = weight.all_input_nodes[0]
    return isinstance(weight, Node) and weight.op == "get_attr"


def _batch_first(node: Node, batch: Any, time: Any, make: Builder) -> Node | None:
    """Hidden states as ``[B, T, C]``, looking through the reshapes that projections put around them."""
    for _ in range(4):
        shape = tensor_of(node).shape
        if len(shape) == 3 and expression(shape[2]).is_Integer:
            if same_dim(shape[0], batch) and same_dim(shape[1], time):
                return node
            if same_dim(shape[0], time) and same_dim(shape[1], batch):
                return make(aten.transpose.int, node, 0, 1)
        if target_of(node) not in (
            aten.reshape.default,
            aten.view.default,
            aten.flatten.using_ints,
            aten.transpose.int,
        ):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return None


def parse_keep(text: str) -> tuple[tuple[int, ...], int, int]:
    """``--keep-softmax``: ``"0,5,9"`` → sites, ``"6"`` → a count evenly spaced, ``"auto:6"`` → a count chosen by KL.

    Returns (site indices, evenly spaced count, automatic count); none of them for KV heads (``parse_heads``) or a
    number of those (``parse_head_count``).

    Raises:
        LincompileError: anything else.
    """
    if parse_head_count(text) or parse_heads(text):
        return (), 0, 0
    try:
        if text.startswith("auto:"):
            if (count := int(text[5:])) < 1:
                raise ValueError
            return (), 0, count
        if "," in text:
            return tuple(int(part) for part in text.split(",") if part.strip()), 0, 0
        if (count := int(text)) < 0:
            raise ValueError
        return (), count, 0
    except ValueError:
        raise LincompileError(
            f"--keep-softmax {text}: write a number (6), 'auto:6', site indices (0,5,9), KV heads (17.1,18.2), or "
            "how many of those to choose (heads:4)"
        ) from None
