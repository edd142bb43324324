"""``lincompile inspect MODEL``: every attention site, with its verdict and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from ..passes.program import AttentionSite

COLOURS = {"rewrite": "green", "keep": "yellow", "refuse": "red"}


@click.command("inspect")
@click.argument("model")
@common.model_options
@common.json_option
@common.verbose_option
def command(
    model: str, builder: str | None, trust: bool, device: str, dtype: str, as_json: bool, verbose: bool
) -> None:
    """Show every attention site of MODEL: what was found, proved, refused, and why."""
    from ..passes.pipeline import Pipeline

    loaded = common.load(model, builder=builder, trust=trust, device=device, dtype=dtype)
    program = common.captured(loaded)
    with common.working("proving attention sites"):
        program = Pipeline("canonicalize,prove")(program)
    if as_json:
        common.print_json(
            {
                "sites": [site.record() for site in program.sites],
                "parameters": program.parameters,
                "format": loaded.format,
                "task": loaded.task,
                "max_positions": program.max_positions,
                "notes": [*loaded.notes, *program.notes],
            }
        )
        return
    out = common.stdout()
    out.print(f"[bold]{loaded.source}[/bold] ({loaded.format}): {program.parameters:,} parameters")
    if not program.sites:
        out.print("This model has no softmax attention. It can still be quantized: --attn softmax --quant int6")
        return
    out.print(site_table(program.sites, verbose))
    counts = {name: sum(site.verdict == name for site in program.sites) for name in COLOURS}
    out.print(", ".join(f"[{COLOURS[name]}]{count} {name}[/]" for name, count in counts.items() if count))


def site_table(sites: list[AttentionSite], verbose: bool) -> Any:
    """The table of sites; with ``verbose``, also the source line each was traced from."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("#", "site", "kind", "heads", "verdict", "max error", "reason"):
        table.add_column(title, overflow="fold", justify="right" if title in ("#", "max error") else "left")
    if verbose:
        table.add_column("source", overflow="fold")
    for index, site in enumerate(sites):
        shape = f"{site.heads}/{site.kv_heads} × {site.head_dim}" if site.heads else "?"
        kind = f"{site.kind} {site.window}" if site.window else site.kind
        error = "" if site.max_error is None else f"{site.max_error:.1e}"
        colour = COLOURS.get(site.verdict, "white")
        row = [str(index), site.path, kind, shape, f"[{colour}]{site.verdict}[/]", error, site.reason]
        table.add_row(*row, *([site.source] if verbose else []))
    return table
