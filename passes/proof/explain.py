"""Why one site got its verdict: its canonical form, what probing its scores found, and its part of the graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch.fx import Node

from ..errors import LincompileError
from ..graph import value_of
from ..identity import describe, unique_path
from ..listing import described, node_line, size_names, source_of
from ..program import AttentionSite, Program
from .classify import Findings, classify
from .evaluate import Opaque
from .forms import Unstable
from .match import Candidate, find_candidates
from .probe import Probe, allowed_keys, near

PICTURE = 12  # positions in the picture of a mask


@dataclass(frozen=True)
class Line:
    """One node of a site's slice: where it was written (``file:line``), the code there, and the node as text."""

    source: str
    code: str
    node: str


@dataclass(frozen=True)
class Explanation:
    """What ``inspect --explain`` prints.

    ``canonical`` is the op that stands for the site, or '' where it was refused. ``formula`` says what it computes.
    ``mask`` draws which keys (columns) the queries (rows) of a short sequence see; empty where that can't be known.
    ``findings`` is None where the walk alone refused the site.
    """

    site: AttentionSite
    canonical: str
    formula: str
    findings: Findings | None
    mask: tuple[str, ...]
    slice: tuple[Line, ...]

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "site": self.site.record(),
            "canonical": self.canonical,
            "formula": self.formula,
            "findings": None if self.findings is None else asdict(self.findings),
            "mask": list(self.mask),
            "slice": [asdict(line) for line in self.slice],
        }


def find_site(program: Program, wanted: str) -> AttentionSite:
    """The site with that path or that index (``0`` is the first).

    Raises:
        LincompileError: there is none; the message lists the paths.
    """
    if wanted.lstrip("-").isdigit() and not any(site.path == wanted for site in program.sites):
        index = int(wanted)
        if not 0 <= index < len(program.sites):
            raise LincompileError(f"no attention site {wanted}: the model has {len(program.sites)}, counted from 0")
        return program.sites[index]
    return program.site(wanted)


def explain(canonical: Program, proved: Program, wanted: str, alibi: bool = False) -> Explanation:
    """Explains one site.

    Args:
        canonical: the program after ``Canonicalize`` and before ``ProveAttention`` (its slices are still there).
        proved: the same after ``ProveAttention``.
        wanted: the site's path or index.
        alibi: as given to ``ProveAttention``.

    Raises:
        LincompileError: there is no such site.
    """
    site = find_site(proved, wanted)
    candidate = _candidates(canonical)[site.path]
    names = size_names(canonical)
    findings = None if candidate.problem is not None else classify(canonical, candidate, alibi)
    return Explanation(
        site,
        _canonical_text(proved, site),
        formula(site) if site.proved else "",
        findings,
        () if findings is None else tuple(picture(Probe(canonical, candidate), findings)),
        tuple(Line(*source_of(node), node_line(node, names)) for node in slice_of(canonical, candidate)),
    )


def _candidates(program: Program) -> dict[str, Candidate]:
    """Candidates under the paths that ``ProveAttention`` gives their sites."""
    found: dict[str, Candidate] = {}
    for candidate in find_candidates(program.graph_module):
        found[unique_path(describe(program, candidate).path, list(found))] = candidate
    return found


def _canonical_text(program: Program, site: AttentionSite) -> str:
    if site.node is None:
        return ""
    names = size_names(program)
    q, k, v, padding = site.node.args[:4]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    parts = [f"q = {described(q, names)}", f"k = {described(k, names)}", f"v = {described(v, names)}"]
    if isinstance(padding, Node):
        parts.append(f"key_padding = {described(padding, names)}")
    parts += [f"kind = {site.kind}", *([f"window = {site.window}"] if site.window else []), f"scale = {site.scale:g}"]
    parts += [f"softcap = {site.softcap:g}"] if site.softcap else []
    return f"{described(site.node, names)} = softmax_attention({', '.join(parts)})"


def formula(site: AttentionSite) -> str:
    """What a proved site computes, for query position i and key position j."""
    scores = f"{site.scale:g}·q·kᵀ"
    if site.softcap:
        scores = f"{site.softcap:g}·tanh({scores} / {site.softcap:g})"
    seen = {"full": "all j", "causal": "j ≤ i", "sliding": f"i − {site.window} < j ≤ i"}[site.kind]
    real = " and j is a real token" if site.padding else ""
    assert site.heads and site.kv_heads
    heads = f"; query head h reads KV head h // {site.heads // site.kv_heads}" if site.heads != site.kv_heads else ""
    return f"o = softmax({scores} over {seen}{real}) · v{heads}"


def picture(probe: Probe, findings: Findings) -> list[str]:
    """Which keys the first queries see without padding, drawn; nothing where the mask can't be evaluated."""
    probe.inverted = dict(findings.padding)
    try:
        limit = min(PICTURE, probe.program.max_positions or PICTURE)
        allowed = allowed_keys(probe, near(probe, probe.sizes(limit, other=0)))[0, 0, :PICTURE, :PICTURE]
    except (Opaque, Unstable):
        return []
    return ["".join("■ " if seen else "· " for seen in row).rstrip() for row in allowed.tolist()]


def slice_of(program: Program, candidate: Candidate) -> list[Node]:
    """The nodes between q, k, v and the site's output, masks and position counters included, in graph order."""
    ends = {candidate.q, candidate.k, candidate.v, candidate.out}
    inner = {node for node in (candidate.scores, candidate.softmax, candidate.weights) if node is not None}
    wanted = {*ends, *inner, *candidate.chain, *Probe(program, candidate).slice_nodes()}
    return [node for node in program.graph_module.graph.nodes if node in wanted and value_of(node) is not None]
