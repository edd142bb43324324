"""``lincompile eval --passkey``: runs it with a progress bar, and shows the heat map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import common, heat_map

if TYPE_CHECKING:
    from ..lowering.evaluation.passkey import Passkey, PasskeyResult
    from ..lowering.evaluation.subject import Subject


def show(
    opened: Callable[[str], Subject],
    model: str,
    haystack: str | list[int],
    options: Passkey,
    extrapolate: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Asks for the keys; the plot is brought up to date after each cell, so that an interruption leaves something."""
    from ..lowering.evaluation.passkey import retrieve
    from ..passes.errors import LincompileError

    if isinstance(haystack, list):
        raise LincompileError("--haystack needs text (UTF-8), not token ids: the key must be written into it")
    subject = opened(model)
    if extrapolate:
        subject = subject.beyond_configuration()

    def keep(result: PasskeyResult) -> None:
        if plot is not None:
            heat_map.write(plot, Path(model).name, result)

    with common.counting("reading prompts (tokens)") as advance:
        result = retrieve(subject, haystack, options, on_cell=keep, on_token=advance)
    if as_json:
        common.print_json(result.record())
        return
    common.stdout().print(heat_map.table(result))
    common.stdout().print(f"[bold]{result.accuracy():.0%}[/bold] of the keys, in {result.seconds:.0f} s")
