"""Rewrites every proved softmax attention to the canonical op, after proving the two equal on the site itself.

The proof runs the site's own region of the graph and the canonical op on the same random q, k, v, at several sizes
and with padding, and compares outputs and the gradients of all three. What differs is left alone, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from .graph import (
    Builder,
    aten,
    expression,
    finish,
    module_path,
    order_of,
    same_dim,
    source_line,
    tensor_of,
    value_inputs,
    walk_up,
    written_nodes,
)
from .inputs import read_by
from .linearization.alibi import with_positions
from .pipeline import PassResult, register
from .program import AttentionSite, Program
from .proof.classify import Findings, classify, padding_patterns
from .proof.evaluate import Opaque, Sizes, evaluate
from .proof.match import Candidate, find_candidates
from .proof.operands import Unsupported, canonical_operands, fold_groups, int_dim
from .proof.probe import Probe
from .proof.region import RegionKeys
from .proof.twins import of_twin, signature

TOLERANCE = 1e-5


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
        replaced: dict[Node, Node] = {}
        for candidate in find_candidates(program.graph_module):
            candidate.q, candidate.k, candidate.v = (
                replaced.get(x, x) for x in (candidate.q, candidate.k, candidate.v)
            )
            site = describe(program, candidate)
            site.path = unique_path(site.path, [*canonical, *(s.path for s in found)])
            output = examine(program, candidate, site, self.tolerance, cache)
            if output is not None:
                replaced[candidate.out] = output
            elif site.heads is None:
                _count_heads(program, candidate, site)
            found.append(site)
        finish(program.graph_module)
        read_by(program, cache.readings)
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
    findings: dict[Any, tuple[Candidate, Findings]] = field(default_factory=dict)  # and whose they are
    readings: dict[str, dict[bool, str]] = field(default_factory=dict)  # mask input → what 1 means → a site's path
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


def examine(program: Program, candidate: Candidate, site: AttentionSite, tolerance: float, cache: Cache) -> Node | None:
    """Fills in a site's record and, when everything is proved, rewrites it: returns what stands for its output then."""
    site.details["order"] = order_of(program.graph_module)[candidate.out]
    if candidate.problem is not None:
        site.kind, site.reason = candidate.problem
        return None
    key = signature(candidate)
    if key not in cache.findings:
        cache.findings[key] = candidate, classify(program, candidate, cache.alibi)
    first, findings = cache.findings[key]
    _fill(site, findings)
    if not findings.supported:
        site.reason = of_twin(findings.reason, first, candidate)
        return None
    for name, inverted in findings.padding.items():
        cache.readings.setdefault(name, {}).setdefault(inverted, site.path)
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
        return None
    candidate.out.replace_all_uses_with(replacement.output)
    program.graph_module.graph.erase_node(candidate.out)
    site.details.pop("order")
    site.node = replacement.op
    site.verdict = "rewrite"
    site.reason = f"equal to canonical softmax attention to {site.max_error:.1e} (outputs and gradients)"
    if findings.bias == "alibi":
        site.reason += ", its ALiBi as one more feature of q and k"
    return replacement.output


def _fill(site: AttentionSite, findings: Findings) -> None:
    site.kind, site.window = findings.kind, findings.window
    site.padding = ", ".join(findings.padding) or None
    site.packing = "by positions" if findings.kind == "packed" else "none"
    if findings.probed:
        site.scale, site.softcap = findings.scale, findings.softcap or None
        site.bias, site.slopes = findings.bias, findings.slopes


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
    q, k, v, shape = _grouped(program, candidate, q, k, v)
    heads = shape[0]
    key_padding = _key_padding(program, make, findings)
    if findings.bias == "alibi":
        assert findings.slopes is not None
        if tensor_of(q).dtype not in (torch.float32, torch.float64):
            raise Unsupported(f"ALiBi in {tensor_of(q).dtype}: positions need float32; load the model in float32")
        if findings.counted and key_padding is None:
            raise Unsupported("ALiBi counts the real tokens, but nothing masks the others")
        if len(findings.slopes) not in (1, heads):
            raise Unsupported(f"{len(findings.slopes)} ALiBi slopes (batch and heads in one axis?) for {heads} heads")
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


def _grouped(
    program: Program, candidate: Candidate, q: Node, k: Node, v: Node
) -> tuple[Node, Node, Node, tuple[int, int, int, int]]:
    """Q, k and v with their KV heads un-expanded, and (heads, KV heads, head_dim, value dim)."""
    heads = int_dim(tensor_of(q).shape[1], "query heads")
    probe = Probe(program, candidate)
    sizes = [probe.sizes(5), probe.sizes(7, batch=3)]
    folded_k, folded_v = fold_groups(program, k, heads, sizes), fold_groups(program, v, heads, sizes)
    if same_dim(tensor_of(folded_k).shape[1], tensor_of(folded_v).shape[1]):
        k, v = folded_k, folded_v
    kv_heads = int_dim(tensor_of(k).shape[1], "key heads")
    if kv_heads != int_dim(tensor_of(v).shape[1], "value heads") or heads % kv_heads:
        raise Unsupported(
            f"{heads} query heads, {kv_heads} key heads and {tensor_of(v).shape[1]} value heads don't form groups"
        )
    dims = int_dim(tensor_of(q).shape[-1], "head_dim"), int_dim(tensor_of(v).shape[-1], "value dim")
    return q, k, v, (heads, kv_heads, *dims)


def _count_heads(program: Program, candidate: Candidate, site: AttentionSite) -> None:
    """Heads and their sizes of a site that is left alone, where its operands are those of attention."""
    if candidate.form == "nested" or candidate.q is candidate.k:
        return  # q and k belong to another graph, or weren't told apart
    try:
        with _Attempt(program.graph_module):
            operands = canonical_operands(program, candidate, Builder(program.graph_module, candidate.out))[:3]
            site.heads, site.kv_heads, site.head_dim, site.value_dim = _grouped(program, candidate, *operands)[3]
    except Unsupported:
        return


def _key_padding(program: Program, make: Builder, findings: Findings) -> Node | None:
    """``[B, S]`` bool, True = real token, from the mask inputs that were proved to remove padded keys."""
    combined: Node | None = None
    for name, inverted in findings.padding.items():
        source = program.placeholder(name)
        real = make(aten.eq.Scalar if inverted else aten.ne.Scalar, source, 0)
        combined = real if combined is None else make(aten.logical_and.default, combined, real)
    return combined


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
        keep = evaluate(module, replacement.output, sizes, {replacement.op: rows}) > 0
        original, canonical = (value.where(keep, 0.0) for value in (original, canonical))
    worst, size = float((original - canonical).detach().abs().max()), float(canonical.detach().abs().max())
    leaves = list(env.values())
    for a, b in zip(_gradients(original, weight, leaves), _gradients(canonical, weight, leaves), strict=True):
        if real_rows is not None:  # a padded query that sees nothing makes gradients NaN in many spellings
            a = a.where(a.isfinite(), b)
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
