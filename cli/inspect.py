"""``lincompile inspect MODEL``: every attention site, with its verdict and the reason; why, where, and what changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from rich.text import Text

    from ..passes.pipeline import Pass
    from ..passes.program import AttentionSite
    from ..passes.proof.explain import Explanation

COLOURS = {"rewrite": "green", "keep": "yellow", "refuse": "red"}
DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def passes_option(ctx: click.Context, param: click.Parameter, value: str | None) -> list[Pass]:
    """``--passes``, read before anything is loaded."""
    from ..passes.errors import LincompileError
    from ..passes.pipeline import parse

    try:
        return [] if value is None else parse(value)
    except LincompileError as error:
        raise click.BadParameter(str(error), ctx, param) from None


@click.command("inspect")
@click.argument("model")
@click.option("--tree", is_flag=True, help="The sites as a tree by module path; layers that are alike share a line.")
@click.option(
    "--explain", metavar="SITE", help="One site by path or number: canonical form, what was found, its graph slice."
)
@click.option("--diff", is_flag=True, help="The graph before and after the passes, line by line.")
@click.option(
    "--passes",
    metavar="TEXT",
    callback=passes_option,
    help="More passes after canonicalize,prove, such as 'linearize{attn=gla}'.",
)
@click.option("--alibi", is_flag=True, help=common.ALIBI_HELP)
@common.model_options
@common.json_option
@common.verbose_option
def command(
    model: str,
    tree: bool,
    explain: str | None,
    diff: bool,
    passes: list[Pass],
    alibi: bool,
    builder: str | None,
    trust: bool,
    device: str,
    dtype: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show every attention site of MODEL: what was found, proved, refused, and why."""
    from ..passes.identity import ProveAttention
    from ..passes.listing import difference, listing
    from ..passes.pipeline import Pipeline
    from ..passes.proof.explain import explain as explain_site

    loaded = common.load(model, builder=builder, trust=trust, device=device, dtype=dtype)
    program = common.captured(loaded)
    before = listing(program) if diff else []
    with common.working("proving attention sites"):
        program = Pipeline("canonicalize")(program)
        canonical = program.clone() if explain is not None else program
        program = Pipeline([ProveAttention(alibi=alibi)])(program)
        explanation = None if explain is None else explain_site(canonical, program, explain, alibi)
        told = len(program.notes)
        program = Pipeline(passes)(program)
    for remark in program.notes[told:]:
        common.note(remark)
    changes = difference(before, listing(program)) if diff else []
    if as_json:
        document = {
            "sites": [site.record() for site in program.sites],
            "parameters": program.parameters,
            "format": loaded.format,
            "task": loaded.task,
            "max_positions": program.max_positions,
            "notes": [*loaded.notes, *program.notes],
        }
        document |= {"explanation": explanation.record()} if explanation is not None else {}
        document |= {"diff": changes} if diff else {}
        document |= {"tree": nested(program.sites)} if tree else {}
        common.print_json(document)
        return
    out = common.stdout()
    if explanation is not None:
        print_explanation(explanation)
    if diff:
        for line in changes:
            out.print(coloured(line, DIFF_COLOURS.get(line[:1], "dim")), soft_wrap=True)
        removed, added = (sum(line.startswith(sign) for line in changes) for sign in "-+")
        out.print(f"{removed} lines removed, {added} added")
    if explanation is not None or diff:
        return
    out.print(f"[bold]{loaded.source}[/bold] ({loaded.format}): {program.parameters:,} parameters")
    if not program.sites:
        out.print("This model has no softmax attention. It can still be quantized: --attn softmax --quant int6")
        return
    out.print(site_tree(program.sites, loaded.source) if tree else site_table(program.sites, verbose))
    counts = {name: sum(site.verdict == name for site in program.sites) for name in COLOURS}
    out.print(", ".join(f"[{COLOURS[name]}]{count} {name}[/]" for name, count in counts.items() if count))


def coloured(text: str, style: str) -> Text:
    """Text in one style, its brackets left alone."""
    from rich.text import Text

    return Text(text, style=style)


def site_table(sites: list[AttentionSite], verbose: bool) -> Any:
    """The table of sites and, below it, why some aren't rewritten; with ``verbose``, also the lines they stand in."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("#", "site", "kind", "heads", "verdict", "max error"):
        table.add_column(title, overflow="fold", justify="right" if title in ("#", "max error") else "left")
    remarks: dict[tuple[str, str], list[int]] = {}
    for index, site in enumerate(sites):
        cells = [escape(cell) for cell in (str(index), site.path, kind_of(site), heads_of(site))]
        table.add_row(*cells, _verdict(site.verdict, site.method), error_of(site))
        if site.verdict != "rewrite":
            remarks.setdefault((_verdict(site.verdict), site.reason), []).append(index)
    if verbose:
        for index, site in enumerate(sites):
            remarks.setdefault(("source", site.source), []).append(index)
    below = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        below.add_column(overflow="fold")
    for (label, text), indices in remarks.items():
        below.add_row(label, ranges(indices), escape(text))
    return Group(table, "", below) if remarks else table


def _verdict(verdict: str, method: str = "softmax") -> str:
    """The verdict in its colour, and the method of a site that is softmax attention no more."""
    return f"[{COLOURS.get(verdict, 'white')}]{verdict}[/]" + ("" if method == "softmax" else f" as {method}")


def ranges(indices: list[int]) -> str:
    """Rising numbers, neighbours as ranges: ``0-3, 7``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def kind_of(site: AttentionSite) -> str:
    """``sliding 4096``, ``causal`` …, with the position bias where one was found."""
    kind = f"{site.kind} {site.window}" if site.window else site.kind
    return kind if site.bias in ("none", "row-constant", "unknown") else f"{kind} + {site.bias}"


def heads_of(site: AttentionSite) -> str:
    """``9/3 × 64``: query heads, KV heads, head_dim."""
    return f"{site.heads}/{site.kv_heads} × {site.head_dim}" if site.heads else "?"


def error_of(site: AttentionSite) -> str:
    """The largest difference the proof saw, '' where there was no proof."""
    return "" if site.max_error is None else f"{site.max_error:.1e}"


def nested(sites: list[AttentionSite]) -> dict[str, Any]:
    """The sites by module path: ``{"layers": {"0": {"self_attn": record}}}``."""
    root: dict[str, Any] = {}
    for site in sites:
        *parents, leaf = site.path.split(".")
        branch = root
        for part in parents:
            branch = branch.setdefault(part, {})
        branch.setdefault(leaf, {}).update(site.record())
    return root


def site_tree(sites: list[AttentionSite], title: str) -> Any:
    """The sites as a tree by module path, verdicts in colour; numbered modules that are alike share a branch."""
    from rich.markup import escape
    from rich.tree import Tree

    branches: dict[str, Any] = {}
    for site in sites:
        branch = branches
        for part in site.path.split("."):
            branch = branch.setdefault(part, {})
        branch[""] = [site]
    tree = Tree(f"[bold]{escape(title.rstrip('/').rpartition('/')[2])}[/]", guide_style="dim")
    _grow(tree, branches)
    return tree


def _label(sites: list[AttentionSite]) -> str:
    from rich.markup import escape

    site = sites[0]
    errors = [item.max_error for item in sites if item.max_error is not None]
    error = f", equal to {max(errors):.1e}" if errors else f": {escape(site.reason)}"
    shape = f" {heads_of(site)}" if site.heads else ""
    return f" [dim]{escape(kind_of(site))}{shape}[/] {_verdict(site.verdict, site.method)}{error}"


def _grow(tree: Any, branches: dict[str, Any]) -> None:
    from rich.markup import escape

    for names, branch in _merged({name: child for name, child in branches.items() if name}):
        label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} alike)"
        while list(branch) and "" not in branch and len(branch) == 1:  # a chain without forks is one line
            name, branch = next(iter(branch.items()))
            label = f"{label}.{name}"
        sites = branch.get("")
        _grow(tree.add(escape(label) + (_label(sites) if sites else "")), branch)


def _merged(branches: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Neighbouring numbered branches of one shape as one, their sites put together."""
    merged: list[tuple[list[str], dict[str, Any]]] = []
    for name, branch in branches.items():
        if merged and name.isdigit() and merged[-1][0][-1].isdigit() and _alike(merged[-1][1], branch):
            merged[-1][0].append(name)
            _absorb(merged[-1][1], branch)
        else:
            merged.append(([name], branch))
    return merged


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if set(a) != set(b):
        return False
    if "" in a:
        facts = [
            (s.kind, s.window, s.heads, s.kv_heads, s.head_dim, s.verdict, s.bias, s.proved or s.reason)
            for s in (a[""][0], b[""][0])
        ]
        if facts[0] != facts[1]:
            return False
    return all(_alike(a[name], b[name]) for name in a if name)


def _absorb(into: dict[str, Any], branch: dict[str, Any]) -> None:
    for name, child in branch.items():
        if name:
            _absorb(into[name], child)
        else:
            into[name] = [*into[name], *child]


def print_explanation(explanation: Explanation) -> None:
    """Canonical form, findings, the mask drawn, and the slice with the source lines it was traced from."""
    from rich.markup import escape

    out = common.stdout()
    site, findings = explanation.site, explanation.findings
    colour = COLOURS.get(site.verdict, "white")
    out.print(f"[bold]{escape(site.path)}[/]  [{colour}]{site.verdict}[/]: {escape(site.reason)}", soft_wrap=True)
    out.print(f"traced from {escape(site.source) or 'an unknown line'}", soft_wrap=True)
    out.print("\n[bold]canonical form[/]")
    out.print(escape(explanation.canonical) or "none: the site stays as it is", soft_wrap=True)
    if explanation.formula:
        out.print(escape(explanation.formula), soft_wrap=True)
    out.print("\n[bold]found by probing the scores[/]")
    if findings is None:
        out.print("not probed: the ops around the softmax already say that it isn't canonical")
    elif not findings.probed:
        out.print(f"  kind     {escape(findings.kind)}: nothing else could be found out")
    else:
        facts = {
            "kind": f"{findings.kind} {findings.window}" if findings.window else findings.kind,
            "scale": f"{findings.scale:g}",
            "softcap": f"{findings.softcap:g}" if findings.softcap else "none",
            "bias": findings.bias,
            "slopes": ", ".join(f"{slope:g}" for slope in findings.slopes or ()),
            "padding": ", ".join(
                f"{name} ({'1 = padding' if inverted else '1 = real'})" for name, inverted in findings.padding.items()
            )
            or "none",
            "lengths": ", ".join(map(str, findings.probed)),
        }
        for name, value in facts.items():
            if value:
                out.print(f"  {name:<8} {escape(value)}", soft_wrap=True)
    if explanation.mask:
        out.print("  mask     (rows: queries, columns: keys)")
        for row in explanation.mask:
            out.print(f"           {row}")
    out.print("\n[bold]graph slice[/]")
    last = ""
    for line in explanation.slice:
        if line.source != last:
            out.print(coloured(f"  {line.source or 'no source recorded'}  {line.code}", "cyan"), soft_wrap=True)
            last = line.source
        out.print(coloured(f"      {line.node}", ""), soft_wrap=True)
