"""Rewrites every proved softmax attention to the canonical op, after proving the two equal on the site itself.

The proof runs the site's own region of the graph and the canonical op on the same random q, k, v, at several sizes
and with padding, and compares outputs and the gradients of all three. What differs is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from .alibi import with_positions
from .classify import Findings, classify, padding_patterns
from .evaluate import Opaque, Sizes, evaluate
from .graph import (
    Builder,
    aten,
    expression,
    finish,
    module_path,
    order_of,
    same_dim,
    source_line,
    symbols_in,
    target_of,
    tensor_of,
    value_inputs,
    value_of,
    walk_up,
    written_nodes,
)
from .match import Candidate, find_candidates
from .pipeline import PassResult, register
from .probe import Probe
from .program import AttentionSite, Program
from .region import RegionKeys

TOLERANCE = 1e-5
EXPANSIONS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.clone.default,
        aten.contiguous.default,
        aten.repeat_interleave.self_int,
        aten.repeat.default,
        aten.flatten.using_ints,
        aten.index.Tensor,
    }
)


class Unsupported(Exception):
    """The site's operands can't be brought to ``[B, heads, T, head_dim]``; carries the reason."""


@register("prove")
@dataclass(frozen=True)
class ProveAttention:
    """Finds every softmax attention, classifies it, proves it and replaces it by ``lincompile.softmax_attention``.

    Args:
        tolerance: largest absolute difference accepted, relative to the larger of 1 and the values' own size.
        alibi: also prove attention with ALiBi, whose bias becomes one more feature of q and k (float32 and above).
    """

    tolerance: float = TOLERANCE
    alibi: bool = False
    name: str = field(default="prove", init=False, metadata={"text": False})

    def run(self, program: Program) -> PassResult:
        canonical = {site.path: site for site in program.sites if site.proved}
        found: list[AttentionSite] = []
        cache = Cache(RegionKeys(program.graph_module), written_nodes(program.graph_module), self.alibi)
        for candidate in find_candidates(program.graph_module):
            site = describe(program, candidate)
            site.path = unique_path(site.path, [*canonical, *(s.path for s in found)])
            examine(program, candidate, site, self.tolerance, cache)
            found.append(site)
        finish(program.graph_module)
        order = order_of(program.graph_module)
        end = len(order)
        program.sites = sorted(
            [*canonical.values(), *found],
            key=lambda s: order.get(s.node, end) if s.node is not None else s.details.pop("order", end),
        )
        proved = sum(site.proved for site in found)
        report = {"found": len(found), "proved": proved, "refused": {s.path: s.reason for s in found if not s.proved}}
        return PassResult(program, modified=proved > 0, report=report)


@dataclass
class Cache:
    """Findings by score chain and proofs by region, shared by sites of one structure."""

    regions: RegionKeys
    written: set[Node] = field(default_factory=set)
    alibi: bool = False
    findings: dict[Any, Findings] = field(default_factory=dict)
    errors: dict[Any, float] = field(default_factory=dict)


def describe(program: Program, candidate: Candidate) -> AttentionSite:
    """A site's record before anything about it is known but its place."""
    path = module_path(candidate.anchor) or "attention"
    return AttentionSite(path=path, kind="unknown", verdict="refuse", reason="", source=source_line(candidate.anchor))


def unique_path(path: str, taken: list[str]) -> str:
    """The path itself, or with ``#2``, ``#3`` … when one module holds several sites."""
    number, name = 1, path
    while name in taken:
        number += 1
        name = f"{path}#{number}"
    return name


def examine(program: Program, candidate: Candidate, site: AttentionSite, tolerance: float, cache: Cache) -> None:
    """Fills in a site's record and, when everything is proved, rewrites it."""
    site.details["order"] = order_of(program.graph_module)[candidate.out]
    if candidate.problem is not None:
        site.kind, site.reason = candidate.problem
        return
    key = signature(candidate)
    if key not in cache.findings:
        cache.findings[key] = classify(program, candidate, cache.alibi)
    findings = cache.findings[key]
    _fill(site, findings)
    if not findings.supported:
        site.reason = findings.reason
        return
    try:
        with _Attempt(program.graph_module) as attempt:
            replacement = build(program, candidate, findings)
            changed = cache.written.intersection(walk_up(candidate.out, frozenset(replacement.bases)))
            if changed:
                raise Unsupported(f"'{next(iter(changed)).name}' is changed in place while the attention reads it")
            site.heads, site.kv_heads, site.head_dim, site.value_dim = replacement.shape
            region = cache.regions.key((candidate.out, replacement.output), replacement.bases)
            if region not in cache.errors:
                cache.errors[region] = prove(program, candidate, replacement, findings, tolerance)
            site.max_error = cache.errors[region]
            attempt.keep()
    except Unsupported as error:
        site.reason = str(error)
        return
    candidate.out.replace_all_uses_with(replacement.output)
    program.graph_module.graph.erase_node(candidate.out)
    site.details.pop("order")
    site.node = replacement.op
    site.verdict = "rewrite"
    site.reason = f"equal to canonical softmax attention to {site.max_error:.1e} (outputs and gradients)"
    if findings.bias == "alibi":
        site.reason += ", its ALiBi as one more feature of q and k"


def _fill(site: AttentionSite, findings: Findings) -> None:
    site.kind, site.window = findings.kind, findings.window
    site.scale = findings.scale
    site.softcap = findings.softcap or None
    site.bias, site.slopes = findings.bias, findings.slopes
    site.padding = ", ".join(findings.padding) or None
    site.packing = "by positions" if findings.kind == "packed" else "none"


def signature(candidate: Candidate) -> Any:
    """Key under which two candidates have one score chain, masks and way to v (the layers of one model, usually)."""
    if candidate.softmax is None:
        shapes = (
            tuple(str(d) for d in tensor_of(candidate.q).shape),
            tuple(str(d) for d in tensor_of(candidate.k).shape),
        )
        return (candidate.form, candidate.mask, candidate.is_causal, candidate.scale, shapes)
    assert candidate.scores is not None
    chain = {candidate.scores, *candidate.chain}
    known: dict[Node, Any] = {candidate.scores: ("scores", tuple(str(d) for d in tensor_of(candidate.scores).shape))}

    def visit(item: Any) -> Any:
        if isinstance(item, (list, tuple)):
            return tuple(visit(part) for part in item)
        if not isinstance(item, Node):
            return str(item)
        if item not in known:
            known[item] = (
                (str(item.target), visit(item.args), visit(tuple(item.kwargs.values()))) if item in chain else item.name
            )
        return known[item]

    bias = candidate.scores.args[0] if target_of(candidate.scores) is aten.baddbmm.default else None
    known[candidate.softmax] = "softmax"
    return (visit(candidate.softmax.args[0]), visit(bias), str(candidate.scores.kwargs), visit(candidate.weights))


@dataclass
class Replacement:
    """The canonical op inserted beside a site, its operands, and its output brought to the site's own layout."""

    op: Node
    output: Node
    q: Node
    k: Node
    v: Node
    padding: Node | None
    shape: tuple[int, int, int, int]
    inserted: set[Node]

    @property
    def bases(self) -> list[Node]:
        """Nodes of the original graph that q, k and v are computed from, each once."""
        inner = self.inserted - {self.padding}
        found = (base for node in (self.q, self.k, self.v) for base in _bases(node, inner))
        return [base for base in dict.fromkeys(found) if base is not self.padding]


class _Attempt:
    """Removes the nodes inserted since it began, unless they are kept."""

    def __init__(self, module: GraphModule) -> None:
        self.graph = module.graph
        self.before = set(module.graph.nodes)
        self.kept = False

    def keep(self) -> None:
        self.kept = True

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.kept:
            for node in reversed([n for n in self.graph.nodes if n not in self.before]):
                self.graph.erase_node(node)


def build(program: Program, candidate: Candidate, findings: Findings) -> Replacement:
    """Inserts the canonical op before the site's output. Raises ``Unsupported`` when the layout isn't understood."""
    make = Builder(program.graph_module, candidate.out)
    existing = set(program.graph_module.graph.nodes)
    q, k, v, restore = canonical_operands(program, candidate, make)
    heads = int_dim(tensor_of(q).shape[1], "query heads")
    sizes = Probe(program, candidate).sizes(5)
    folded_k, folded_v = fold_groups(program, k, heads, sizes), fold_groups(program, v, heads, sizes)
    if same_dim(tensor_of(folded_k).shape[1], tensor_of(folded_v).shape[1]):
        k, v = folded_k, folded_v
    kv_heads = int_dim(tensor_of(k).shape[1], "key heads")
    if kv_heads != int_dim(tensor_of(v).shape[1], "value heads") or heads % kv_heads:
        raise Unsupported(
            f"{heads} query heads, {kv_heads} key heads and {tensor_of(v).shape[1]} value heads don't form groups"
        )
    shape = (heads, kv_heads, int_dim(tensor_of(q).shape[-1], "head_dim"), int_dim(tensor_of(v).shape[-1], "value dim"))
    key_padding = _key_padding(program, make, findings)
    if findings.bias == "alibi":
        assert findings.slopes is not None
        if tensor_of(q).dtype not in (torch.float32, torch.float64):
            raise Unsupported(f"ALiBi in {tensor_of(q).dtype}: positions need float32; load the model in float32")
        if findings.counted and key_padding is None:
            raise Unsupported("ALiBi counts the real tokens, but nothing masks the others")
        counted = key_padding if findings.counted else None
        q, k = with_positions(q, k, findings.slopes, float(findings.scale), counted, make)
    op = make(
        torch.ops.lincompile.softmax_attention.default,
        q,
        k,
        v,
        key_padding,
        findings.kind,
        findings.window or 0,
        float(findings.scale),
        float(findings.softcap),
    )
    output = restore(op)
    return Replacement(op, output, q, k, v, key_padding, shape, set(program.graph_module.graph.nodes) - existing)


def int_dim(dim: int | torch.SymInt, what: str) -> int:
    """A size that must be fixed, as an int; ``Unsupported`` naming ``what`` otherwise."""
    expr = expression(dim)
    if not expr.is_Integer:
        raise Unsupported(f"the number of {what} isn't fixed ({expr})")
    return int(expr)


def _key_padding(program: Program, make: Builder, findings: Findings) -> Node | None:
    """``[B, S]`` bool, True = real token, from the mask inputs that were proved to remove padded keys."""
    combined: Node | None = None
    for name, inverted in findings.padding.items():
        source = program.placeholder(name)
        real = make(aten.eq.Scalar if inverted else aten.ne.Scalar, source, 0)
        combined = real if combined is None else make(aten.logical_and.default, combined, real)
    return combined


Restore = Callable[[Node], Node]


def canonical_operands(program: Program, candidate: Candidate, make: Builder) -> tuple[Node, Node, Node, Restore]:
    """Q ``[B, H, T, D]``, k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]`` and the way back to the site's layout."""
    if candidate.softmax is None:
        if tensor_of(candidate.q).dim() == 4:
            return candidate.q, candidate.k, candidate.v, lambda y: y
        k, product = candidate.k, candidate.out
        return _from_ranks(program, candidate.q, k, candidate.v, tensor_of(product).dim(), make)
    assert candidate.scores is not None
    if target_of(candidate.scores) is aten.einsum.default or target_of(candidate.out) is aten.einsum.default:
        return _from_einsum(candidate, make)
    k = untransposed(candidate.k) or make(aten.transpose.int, candidate.k, -1, -2)
    return _from_ranks(program, candidate.q, k, candidate.v, tensor_of(candidate.out).dim(), make)


def _from_ranks(
    program: Program, q: Node, k: Node, v: Node, out_rank: int, make: Builder
) -> tuple[Node, Node, Node, Restore]:
    """Matmul-like operands ``[..., T, D]`` of rank 3 (batch and heads fused), 4, or 5 (grouped heads)."""
    rank = tensor_of(q).dim()
    if rank == 5:
        groups = tensor_of(q).shape[2]
        q = make(aten.flatten.using_ints, q, 1, 2)
        k, v = (_drop_group_axis(x, groups, make) for x in (k, v))
        restore: Restore = lambda y: make(aten.unflatten.int, y, 1, [-1, int_dim(groups, "heads per group")])  # noqa: E731
        return q, k, v, restore
    orders = {fused_order(program, x) for x in (q, k, v) if tensor_of(x).dim() == 3}
    if len(orders) > 1:
        raise Unsupported("q, k and v fuse batch and heads into one axis in different orders")
    heads_first = orders == {"heads first"}
    q, k, v = (split_heads(x, heads_first, make) for x in (q, k, v))
    if out_rank == 3:
        return q, k, v, lambda y: make(aten.flatten.using_ints, swapped(y, heads_first, make), 0, 1)
    if out_rank == 4:
        return q, k, v, lambda y: y
    raise Unsupported(f"attention over tensors of rank {rank} isn't supported")


def _drop_group_axis(node: Node, groups: Any, make: Builder) -> Node:
    """``[B, K, 1 or G, S, D]`` → ``[B, K or K·G, S, D]``."""
    value = tensor_of(node)
    if value.dim() != 5:
        raise Unsupported("grouped queries meet ungrouped keys")
    return make(aten.squeeze.dim, node, 2) if same_dim(value.shape[2], 1) else make(aten.flatten.using_ints, node, 1, 2)


def split_heads(node: Node, heads_first: bool, make: Builder) -> Node:
    """Rank-3 ``[B·H, T, D]`` (or ``[H·B, T, D]`` with ``heads_first``) → ``[B, H, T, D]``; rank 4 unchanged."""
    value = tensor_of(node)
    if value.dim() == 4:
        return node
    if target_of(node) in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        inner = node.args[0]
        assert isinstance(inner, Node)
        source = value_of(inner)
        if (
            source.dim() == 4
            and same_dim(source.shape[3], value.shape[2])
            and same_dim(source.shape[2], value.shape[1])
        ):
            return swapped(inner, heads_first, make)
    heads = fused_heads(node)
    return swapped(make(aten.unflatten.int, node, 0, [heads, -1] if heads_first else [-1, heads]), heads_first, make)


def swapped(node: Node, heads_first: bool, make: Builder) -> Node:
    """``[H, B, ...]`` as ``[B, H, ...]`` and back, where heads come first; otherwise the node itself."""
    return make(aten.transpose.int, node, 0, 1) if heads_first else node


def fused_heads(node: Node) -> int:
    """How many heads the first axis of ``[B·H, T, D]`` holds for each batch row."""
    value = tensor_of(node)
    if value.dim() != 3:
        raise Unsupported(f"an operand of rank {value.dim()} isn't supported")
    expr = expression(value.shape[0])
    if isinstance(expr, sympy.Integer):
        raise Unsupported("batch and heads are fused in one fixed axis, so they can't be told apart")
    heads, rest = expr.as_coeff_Mul()
    if not rest.is_Symbol or not heads.is_Integer:
        raise Unsupported(f"batch and heads are fused in one axis of {expr} rows, which isn't heads × batch")
    return int(heads)


def fused_order(program: Program, node: Node) -> str:
    """Whether the first axis of ``[B·H, T, D]`` is "batch first" or "heads first", proved by where a batch row goes.

    Attention itself doesn't care, but gates, feature maps and states belong to a head and read a row's own tokens. So
    the graph is run from the nearest values that still have a batch axis, with NaN in one of three batch rows.
    """
    heads = fused_heads(node)
    batch = expression(tensor_of(node).shape[0]).as_coeff_Mul()[1]
    rows, chosen = 3, 1
    sources = {n: axis for n in walk_up(node) if n is not node and (axis := _axis_of(n, batch)) is not None}
    nearest = {n: sources[n] for n in walk_up(node, frozenset(sources)) if n in sources}
    symbols = {s for n in walk_up(node, frozenset(nearest)) for dim in _shape(n) for s in symbols_in(dim)}
    sizes = Sizes({name: rows if name == str(batch) else 5 for name in symbols | {str(batch)}})
    env = {}
    for source, axis in nearest.items():
        env[source] = torch.ones(sizes.shape(tensor_of(source)))
        env[source].select(axis, chosen).fill_(float("nan"))
    try:
        reached = evaluate(program.graph_module, node, sizes, env, lambda n: torch.zeros(sizes.shape(tensor_of(n))))
    except Opaque as error:
        raise Unsupported(f"batch and heads are fused in one axis, in an order that can't be found: {error}") from error
    found = reached.isnan().flatten(1)
    at = torch.arange(rows * heads)
    for order, wanted in (("batch first", at // heads == chosen), ("heads first", at % rows == chosen)):
        if torch.equal(found.all(1), wanted) and torch.equal(found.any(1), wanted):
            return order
    raise Unsupported("batch and heads are fused in one axis in an order that is neither batch-major nor head-major")


def _shape(node: Node) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _axis_of(node: Node, batch: sympy.Expr) -> int | None:
    """The axis of a floating-point value that counts exactly the batch rows."""
    value = value_of(node)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return next((axis for axis, dim in enumerate(value.shape) if expression(dim) == batch), None)


def untransposed(node: Node) -> Node | None:
    """The node whose last two axes ``node`` swaps, if that is all it does."""
    value = tensor_of(node)
    last = {value.dim() - 1, value.dim() - 2}
    if target_of(node) is aten.transpose.int:
        a, b = (int(axis) % value.dim() for axis in node.args[1:3])  # type: ignore[arg-type]
        return node.args[0] if {a, b} == last else None  # type: ignore[return-value]
    if target_of(node) is aten.permute.default:
        axes = [int(axis) % value.dim() for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
        swapped = [*range(value.dim() - 2), value.dim() - 1, value.dim() - 2]
        return node.args[0] if axes == swapped else None  # type: ignore[return-value]
    return None


def _equation(node: Node, rank: int) -> tuple[str, str, str]:
    """Labels of a contraction's operands and result; a matmul gets the labels of its axes."""
    if target_of(node) is aten.einsum.default:
        text = str(node.args[0]).replace(" ", "")
        if "." in text or "->" not in text:
            raise Unsupported(f"the einsum '{text}' isn't explicit")
        left, _, out = text.partition("->")
        first, _, second = left.partition(",")
        return first, second, out
    batch = "ABCDE"[: rank - 2]
    return batch + "xz", batch + "zy", batch + "xy"


def _from_einsum(candidate: Candidate, make: Builder) -> tuple[Node, Node, Node, Restore]:
    assert candidate.scores is not None
    if any(tensor_of(n).dim() != tensor_of(candidate.scores).dim() for n in candidate.chain):
        raise Unsupported("the scores change rank between an einsum and the softmax")
    q_labels, k_labels, s_labels = _equation(candidate.scores, tensor_of(candidate.scores).dim())
    p_labels, v_labels, o_labels = _equation(candidate.out, tensor_of(candidate.out).dim())
    if len(p_labels) != len(s_labels):
        raise Unsupported("scores and probabilities have different axes")
    rename = dict(zip(p_labels, s_labels, strict=True))
    unused = iter("αβγδεζηθ")
    for label in dict.fromkeys(v_labels + o_labels):
        rename.setdefault(label, next(unused))
    v_labels, o_labels = ("".join(rename[c] for c in text) for text in (v_labels, o_labels))
    row, column = s_labels[-2], s_labels[-1]
    if row in k_labels or column in q_labels:
        row, column = column, row
        raise Unsupported("the softmax doesn't run over the keys")
    batch = [c for c in s_labels if c not in (row, column)]
    depth = [c for c in q_labels if c in k_labels and c not in s_labels]
    value = [c for c in v_labels if c not in s_labels]
    if len(depth) != 1 or len(value) != 1 or any(c not in q_labels for c in batch) or column not in v_labels:
        raise Unsupported("the einsum isn't q·k or p·v of attention")

    def arrange(node: Node, have: str, want: list[str]) -> Node:
        order = [have.index(c) for c in want]
        return node if order == list(range(len(have))) else make(aten.permute.default, node, order)

    q = arrange(candidate.q, q_labels, [*batch, row, *depth])
    k = arrange(candidate.k, k_labels, [*(c for c in batch if c in k_labels), column, *depth])
    v = arrange(candidate.v, v_labels, [*(c for c in batch if c in v_labels), column, *value])
    groups: int | None = None
    if len(batch) == 3:
        groups = int_dim(tensor_of(q).shape[2], "heads per group")
        q = make(aten.flatten.using_ints, q, 1, 2)
    if len(batch) not in (2, 3) or any(tensor_of(x).dim() != 4 for x in (q, k, v)):
        raise Unsupported(f"einsum attention with {len(batch)} batch axes isn't supported")

    def restore(y: Node) -> Node:
        if groups is not None:
            y = make(aten.unflatten.int, y, 1, [-1, groups])
        return arrange(y, "".join([*batch, row, *value]), list(o_labels))

    return q, k, v, restore


def fold_groups(program: Program, node: Node, heads: int, sizes: Sizes) -> Node:
    """The un-expanded KV heads behind ``repeat_kv`` and its many spellings, proved by evaluating the expansion."""
    best, current = node, node
    for _ in range(10):
        if target_of(current) not in EXPANSIONS:
            break
        current = current.args[0]  # type: ignore[assignment]
        value = tensor_of(current)
        if value.dim() != 4 or not expression(value.shape[1]).is_Integer:
            continue
        few = int(expression(value.shape[1]))
        unlike = any(not same_dim(value.shape[axis], tensor_of(node).shape[axis]) for axis in (0, 2, 3))
        if few >= heads or heads % few or unlike:
            continue
        x = torch.randn(sizes.shape(value))
        try:
            expanded = evaluate(program.graph_module, node, sizes, {current: x})
        except Opaque:
            break
        if torch.equal(expanded, x.repeat_interleave(heads // few, 1)):
            best = current
        break
    return best


def prove(
    program: Program, candidate: Candidate, replacement: Replacement, findings: Findings, tolerance: float
) -> float:
    """Largest difference between the site and its replacement, over sizes, paddings, outputs and gradients.

    Raises:
        Unsupported: they differ by more than ``tolerance``, or the site reads more than q, k, v and masks.
    """
    probe = Probe(program, candidate)
    probe.inverted = dict(findings.padding)
    limit = program.max_positions or 1 << 30
    past = findings.window + 2 if findings.window and findings.window <= 512 else 12
    lengths = sorted({min(t, limit) for t in (1, 7, past)}) if not is_static(probe) else [int(probe.rows)]
    worst = 0.0
    for length in lengths:
        for batch in (1, 2) if length <= 7 else (2,):
            sizes = probe.sizes(length, batch)
            for masks in _mask_variants(probe, findings, sizes):
                error, size = _difference(program, candidate, replacement, sizes, probe.leaf(sizes, masks[0]), masks[1])
                if not error <= tolerance * max(1.0, size):
                    raise Unsupported(
                        f"not canonical softmax attention: at batch {batch}, length {length} it differs by {error:.2g} "
                        f"from {findings.kind} attention with scale {findings.scale:.4g}"
                    )
                worst = max(worst, error)
    return worst


def is_static(probe: Probe) -> bool:
    """Whether the site runs at one length only."""
    return bool(expression(probe.rows).is_Integer)


def _mask_variants(probe: Probe, findings: Findings, sizes: Sizes) -> list[tuple[dict[str, Tensor], Tensor | None]]:
    """(values of the mask inputs, real query rows or None) with and without padding."""
    variants: list[tuple[dict[str, Tensor], Tensor | None]] = [({}, None)]
    for name, inverted in findings.padding.items():
        batch, length = sizes.shape(tensor_of(probe.program.placeholder(name)))
        if length < 3:
            continue
        for real in padding_patterns(batch, length).values():
            variants.append(({name: ~real if inverted else real}, real if probe.same_length else None))
    return variants


def _difference(
    program: Program, candidate: Candidate, replacement: Replacement, sizes: Sizes, leaf: Any, real_rows: Tensor | None
) -> tuple[float, float]:
    """(largest absolute difference, largest value) over the output and the gradients of q, k and v."""
    module = program.graph_module
    given = replacement.bases
    generator = torch.Generator().manual_seed(sum(sizes.binding.values()))
    env = {
        n: torch.randn(sizes.shape(tensor_of(n)), generator=generator, dtype=torch.float32).requires_grad_()
        for n in given
    }
    try:
        with torch.enable_grad():
            original = evaluate(module, candidate.out, sizes, env, leaf)
            canonical = evaluate(module, replacement.output, sizes, env, leaf)
    except Opaque as error:
        raise Unsupported(f"the site depends on more than q, k, v and masks: it {error}") from error
    if original.shape != canonical.shape:
        raise Unsupported(
            f"the site's output {tuple(original.shape)} doesn't have canonical shape {tuple(canonical.shape)}"
        )
    weight = torch.randn(original.shape, generator=generator)
    if real_rows is not None:  # rows of padded queries are nobody's result
        op_value = sizes.shape(tensor_of(replacement.op))
        rows = real_rows[:, None, :, None].expand(op_value).float()
        keep = evaluate(module, replacement.output, sizes, {replacement.op: rows})
        original, canonical = original * keep, canonical * keep
    worst, size = float((original - canonical).detach().abs().max()), float(canonical.detach().abs().max())
    leaves = list(env.values())
    for a, b in zip(_gradients(original, weight, leaves), _gradients(canonical, weight, leaves), strict=True):
        worst, size = max(worst, float((a - b).abs().max())), max(size, float(b.abs().max()))
    return worst if worst == worst else float("inf"), size


def _gradients(output: Tensor, weight: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad((output * weight).sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


def _bases(node: Node, inserted: set[Node]) -> list[Node]:
    """Nodes of the original graph that an operand of the canonical op is computed from."""
    if node not in inserted:
        return [node]
    return [base for item in value_inputs(node) for base in _bases(item, inserted)]
