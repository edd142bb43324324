"""The ``lincompile`` command: ``lincompile MODEL [options]`` compiles, sub-commands do the rest.

Each command lives in a file of its own and is imported only when it runs, so that ``--help`` stays instant. Whatever a
user can get wrong ends in one line on stderr and an exit code: 1 refused or failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from .. import __version__

COMMANDS = {
    "compile": "Compile a model (the default: 'lincompile MODEL').",
    "inspect": "Show every attention site: what was found, proved, refused, and why.",
    "generate": "Continue a prompt with a compiled model.",
    "eval": "Perplexity of a model or an artefact on a text.",
    "bench": "Prefill and decode speed, state and memory of an artefact.",
    "export": "Write an artefact's program for another runtime.",
    "demo": "SmolLM2-135M to linear attention and 6 bits on this machine, with a table of what it cost.",
}


class Commands(click.Group):
    """Lazily imported commands, with ``compile`` as the one meant when the first word is no command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f".{cmd_name}", __package__).command
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in COMMANDS and args[0] not in ("--help", "-h", "--version"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGUMENTS]", prefix="   or: ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        compile_command = self.get_command(ctx, "compile")
        assert compile_command is not None
        compile_command.format_options(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="lincompile", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile a pretrained softmax-attention model into a linear-attention, 6-bit, deployable one.

    MODEL is a Hugging Face folder, a .gguf, .safetensors, .pt2 or .pt file (told apart by content), or
    package.module:function.
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 refused or failed, 2 usage, 130 interrupted."""
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # also where a background shell started us with SIGINT ignored
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Runs the command line; returns the exit code. Every failure is one line on stderr."""
    verbose = "-v" in argv or "--verbose" in argv
    try:
        cli.main(args=argv or ["--help"], prog_name="lincompile", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        command = f"lincompile {error.ctx.info_name} --help" if error.ctx and error.ctx.parent else "lincompile --help"
        return _fail(f"{error.format_message()} (see '{command}')", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; nothing half-written is left behind", 130)
    except BrokenPipeError:  # the reader of stdout has gone, as in `lincompile … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _explain(error, verbose)
    return 0


def _explain(error: Exception, verbose: bool) -> int:
    from ..passes.errors import LincompileError

    if isinstance(error, LincompileError):
        return _fail(str(error), 1)
    if verbose:
        import traceback

        traceback.print_exc()
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return _fail(f"out of memory: {error}", 1)
    if isinstance(error, OSError) and error.strerror:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror}", 1)
    return _fail(f"internal error, please report it: {type(error).__name__}: {error} (-v shows where)", 1)


def _fail(message: str, code: int) -> int:
    """One line on stderr, whatever the message holds."""
    print(f"lincompile: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Stop:
    """SIGTERM and SIGINT end alike, by an exception, so that temporary folders are cleaned up.

    An import is given a few seconds to end first: native modules (Triton's) abort the process when an exception meets
    them while they are set up.
    """

    patience_s = 5.0
    poll_s = 0.05

    def __init__(self) -> None:
        self.deadline = float("inf")

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.deadline = min(self.deadline, now + self.patience_s)
        kill = getattr(signal, "pthread_kill", None)  # absent on Windows
        if kill is None or now >= self.deadline or not _importing(frame):
            raise KeyboardInterrupt
        again = threading.Timer(self.poll_s, kill, (threading.main_thread().ident, signum))
        again.daemon = True
        again.start()


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
