"""The heat map of passkey retrieval, depth × length: on a terminal, as a page, or as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..lowering.evaluation.passkey import Cell, PasskeyResult

PICTURES = (".png", ".svg", ".pdf")
LOW, MIDDLE, HIGH = (178, 45, 45), (214, 169, 58), (46, 139, 87)  # red, amber, green: 0, 0.5 and 1


def colour(share: float) -> str:
    """``#rrggbb`` of a share from 0 to 1."""
    a, b, at = (LOW, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, HIGH, 2 * share - 1)
    return "#" + "".join(f"{round(x + (y - x) * at):02x}" for x, y in zip(a, b, strict=True))


def rows_of(result: PasskeyResult) -> list[tuple[str, list[Cell | None]]]:
    """A row per depth, from the beginning of the prompt to its end: its name and a cell per length (None: not run)."""
    found = {(cell.depth, cell.length): cell for cell in result.cells}
    return [
        (f"{depth:.0%}", [found.get((depth, length)) for length in result.options.lengths])
        for depth in result.options.depths
    ]


def short(tokens: int) -> str:
    """``4K`` for 4000, ``4096`` for 4096."""
    return f"{tokens // 1000}K" if tokens % 1000 == 0 else str(tokens)


def table(result: PasskeyResult) -> Table:
    """For a terminal: hits of trials on a colour; for a file the same without colours."""
    grid = Table(title="passkey retrieval: hits of trials", caption="depth of the key × tokens of the prompt")
    grid.add_column("depth", justify="right")
    for length in result.options.lengths:
        grid.add_column(short(length), justify="center")
    for name, cells in rows_of(result):
        grid.add_row(name, *(Text("") if cell is None else _text(cell) for cell in cells))
    grid.add_section()
    grid.add_row("all", *(f"{result.accuracy(length):.0%}" for length in result.options.lengths))
    return grid


def _text(cell: Cell) -> Text:
    return Text(f" {cell.hits}/{cell.trials} ", style=f"bold white on {colour(cell.hits / cell.trials)}")


def check(path: Path) -> None:
    """Whether a heat map can be written there, before minutes are spent on its content.

    Raises:
        LincompileError: an unknown ending, no such folder, or no matplotlib for a picture.
    """
    from ..passes.errors import LincompileError

    if path.suffix.lower() not in (*PICTURES, ".html"):
        raise LincompileError(f"--plot {path}: the ending says the format: {', '.join(PICTURES)} or .html")
    if not path.absolute().parent.is_dir():
        raise LincompileError(f"--plot {path}: the folder {path.parent} doesn't exist")
    if path.suffix.lower() in PICTURES:
        import importlib.util

        if importlib.util.find_spec("matplotlib") is None:
            raise LincompileError(
                f"--plot {path} needs matplotlib: pip install 'lincompile[report]', or name a .html file"
            )


def write(path: Path, title: str, result: PasskeyResult) -> None:
    """Writes the heat map; see ``check``."""
    if path.suffix.lower() == ".html":
        path.write_text(page(title, result), encoding="utf-8")
    else:
        _picture(path, title, result)


def page(title: str, result: PasskeyResult) -> str:
    """One page without scripts."""
    from ..lowering.artefact.report import STYLE

    head = "".join(f"<th>{short(length)}</th>" for length in result.options.lengths)
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(_data(cell) for cell in cells)}</tr>\n" for name, cells in rows_of(result)
    )
    options = result.options
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · passkey</title>'
        f"<style>{STYLE} td.cell {{ color: #fff; text-align: center; padding: .5rem .8rem; border: 0; }}</style></head>"
        f"\n<body><h1>{escape(title)}</h1>\n<p class=sub>passkey retrieval: depth of the key × tokens of the prompt; "
        f"{options.trials} trials per cell, seed {options.seed}; {result.accuracy():.0%} of all</p>\n"
        f"<table><tr><th></th>{head}</tr>\n{rows}</table></body></html>\n"
    )


def _data(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    return f'<td class=cell style="background:{colour(cell.hits / cell.trials)}">{cell.hits}/{cell.trials}</td>'


def _picture(path: Path, title: str, result: PasskeyResult) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    rows = rows_of(result)
    shares: Sequence[Sequence[float]] = [
        [float("nan") if cell is None else cell.hits / cell.trials for cell in cells] for _, cells in rows
    ]
    colours = LinearSegmentedColormap.from_list("hits", [colour(0), colour(0.5), colour(1)])
    figure = Figure(figsize=(1.5 + 0.8 * len(result.options.lengths), 1.5 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap=colours, aspect="auto")
    axes.set_xticks(range(len(result.options.lengths)), [short(length) for length in result.options.lengths])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set(xlabel="tokens", ylabel="depth", title=f"{title}: {result.accuracy():.0%}")
    figure.colorbar(image, ax=axes, label="share of keys that came back")
    figure.savefig(path)
