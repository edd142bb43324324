"""What the commands share: option types, progress on stderr, one JSON document on stdout."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    import torch

    from ..lowering.package import Artefact
    from ..lowering.sharded import Ranks
    from ..passes.formats.load import LoadedModel
    from ..passes.program import Program

F = TypeVar("F", bound=Callable[..., Any])
ALIBI_HELP = "Also take attention with ALiBi: exactly where it stays softmax, as a decay per head in gla."
_quiet = False  # on all ranks but the first
DTYPES = ("float32", "bfloat16", "float16")


def count(value: str) -> int:
    """A positive whole number, with an optional K, M or G: ``20M``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)", value.strip().lower())
    number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else 0.0
    if not 1 <= number < 1 << 53 or number != int(number):
        raise click.BadParameter(f"'{value}' isn't a positive whole number such as 4096, 500K or 20M")
    return int(number)


def duration(value: str) -> float:
    """Seconds, from ``90``, ``90s``, ``10m`` or ``1.5h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip().lower())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise click.BadParameter(f"'{value}' isn't a time such as 90s, 10m or 1.5h")
    return seconds


def json_option(function: F) -> F:
    """``--json``, the same in every command."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(function)


def verbose_option(function: F) -> F:
    """``-v``, the same in every command: what lincompile logs is shown too."""
    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        callback=_show_log,
        help="Say more; show where an internal error happened.",
    )(function)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


_NOTES = _Notes()


def _show_log(ctx: click.Context, param: click.Parameter, verbose: bool) -> bool:
    logger = logging.getLogger("lincompile")
    if verbose:
        logger.addHandler(_NOTES)
        logger.setLevel(logging.INFO)
    else:
        logger.removeHandler(_NOTES)
        logger.setLevel(logging.NOTSET)
    return verbose


def runtime_option(function: F) -> F:
    """``--runtime``: what runs an artefact."""
    return click.option(
        "--runtime",
        type=click.Choice(["torch", "onnx", "aot"]),
        default="torch",
        show_default=True,
        help="onnx and aot need 'lincompile export' first.",
    )(function)


def device_option(function: F) -> F:
    """``--device``, checked when the command runs."""
    return click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")(function)


def shard_option(what: str) -> Callable[[F], F]:
    """``--shard sp``, for commands that run under torchrun; what they do then happens inside ``ranks``."""
    return click.option(
        "--shard", type=click.Choice(["sp"]), help=f"{what} over the processes that torchrun started (sp: sequence)."
    )


@contextmanager
def ranks(shard: str | None, device: str) -> Iterator[Ranks]:
    """This process's place among the ranks (alone without ``--shard``); all but the first are silent."""
    from ..lowering.sharded import Ranks, joined

    if shard is None:
        yield Ranks(0, 1, device)
        return
    global _quiet
    with joined(device) as place, redirect_stdout(sys.stdout if place.first else io.StringIO()):
        _quiet = not place.first
        try:
            yield place
        finally:
            _quiet = False


def model_options(function: F) -> F:
    """What loading a model takes, besides its name."""
    for option in (
        click.option("--model", "builder", metavar="MODULE:FUNCTION", help="Builds the module of a bare state dict."),
        click.option("--trust", is_flag=True, help="Run code that the model brings along (pickled classes)."),
        device_option,
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the weights."
        ),
    ):
        function = option(function)
    return function


def stderr() -> Console:
    """Progress, warnings and notes."""
    return Console(stderr=True, highlight=False, quiet=_quiet)


def stdout() -> Console:
    """Tables for people; as wide as they need to be when redirected."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_json(document: Any) -> None:
    """The one JSON document of ``--json``."""
    from ..lowering.package import jsonable

    click.echo(json.dumps(jsonable(document), indent=2))


def note(message: str) -> None:
    """A remark for people, on stderr."""
    stderr().print(f"[dim]note:[/dim] {message}", soft_wrap=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars and spinners on stderr, gone when done; silent where stderr isn't a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True) as bars:
        yield bars


@contextmanager
def counting(text: str) -> Iterator[Callable[[int, int], None]]:
    """One bar, to be told (done, total) as work goes on."""
    with progress() as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner while something without a length goes on."""
    with stderr().status(what):
        yield


def check_device(device: str) -> torch.device:
    """The device asked for, or an error that says what this machine has.

    Raises:
        LincompileError: the name is unknown, or no such device is here.
    """
    import torch

    from ..passes.errors import LincompileError

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise LincompileError(f"--device {device}: the choices are cpu, cuda and cuda:N")
    if device != "cpu":
        found = torch.cuda.device_count()
        if (int(device.partition(":")[2] or 0)) >= found:
            raise LincompileError(
                f"--device {device}: this machine shows {found} CUDA devices to torch; use --device cpu"
            )
    return torch.device(device)


def load(model: str, *, builder: str | None, trust: bool, device: str, dtype: str, meta: bool = False) -> LoadedModel:
    """Loads MODEL, with its notes on stderr."""
    import torch

    from ..passes.formats.load import load_model

    check_device(device)
    with working(f"loading {model}"):
        loaded = load_model(model, model=builder, trust=trust, device=device, dtype=getattr(torch, dtype), meta=meta)
    for remark in loaded.notes:
        note(remark)
    return loaded


def is_artefact(path: str) -> bool:
    """Whether ``path`` is a folder that lincompile wrote."""
    return (Path(path) / "lincompile.json").is_file()


def open_checked(path: str, device: str = "cpu") -> Artefact:
    """Opens an artefact, with a spinner (its hashes are compared)."""
    from ..lowering.package import open_artefact

    with working(f"opening {path}"):
        return open_artefact(path, device=check_device(device))


def captured(loaded: LoadedModel) -> Program:
    """The program of a loaded model, not yet rewritten."""
    from ..lowering.compiler import capture_loaded

    with working("capturing (torch.export)"):
        program = capture_loaded(loaded)
    for remark in program.notes:
        note(remark)
    return program
