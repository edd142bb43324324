"""``lincompile eval MODEL_OR_DIR --text FILE``: perplexity, by one code path for teacher and student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import common

if TYPE_CHECKING:
    from ..lowering.evaluate import LogitsOf
    from ..lowering.sharded import Ranks


@click.command("eval")
@click.argument("model", metavar="MODEL_OR_DIR")
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(path_type=Path),
    help="The text to predict (UTF-8; or .npy of token ids).",
)
@click.option("--context", type=common.count, default="1024", show_default=True, help="Tokens per window.")
@click.option("--tokens", type=common.count, help="Stop after so many predicted tokens.")
@click.option("--runtime", type=click.Choice(["torch", "onnx"]), default="torch", show_default=True)
@common.shard_option("Share the tokens of each window")
@common.model_options
@common.json_option
@common.verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    text_file: Path,
    context: int,
    tokens: int | None,
    runtime: str,
    builder: str | None,
    trust: bool,
    device: str,
    dtype: str,
    shard: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Perplexity over non-overlapping windows of a text, no BOS added."""
    if shard and runtime != "torch":
        raise click.UsageError("--shard goes with --runtime torch")
    text = read(text_file)
    if common.is_artefact(model):
        _only_for_models(ctx, model)
    elif runtime != "torch":
        raise click.UsageError("--runtime onnx needs an artefact folder")
    with common.ranks(shard, device) as place:
        if common.is_artefact(model):
            measure(*_student(model, text, runtime, place), context, tokens, as_json)
        else:  # every rank's logits are those of its slice
            measure(*_teacher(model, text, builder, trust, place, dtype), context, tokens, as_json, place.total)


def measure(
    logits_of: LogitsOf,
    ids: list[int],
    limit: int | None,
    context: int,
    tokens: int | None,
    as_json: bool,
    add_up: Callable[[float], float] = float,
) -> None:
    """Predicts the text and says how well."""
    from ..lowering.evaluate import perplexity

    if limit is not None and context > limit:
        raise click.UsageError(f"--context {context}: the model accepts at most {limit} positions")
    with common.progress() as bars:
        task = bars.add_task("predicting tokens", total=None)
        result = perplexity(
            logits_of,
            ids,
            context,
            tokens=tokens,
            on_window=lambda done, total: bars.update(task, completed=done, total=total),
            add_up=add_up,
        )
    if as_json:
        common.print_json(result.record())
    else:
        common.stdout().print(
            f"perplexity [bold]{result.perplexity:.3f}[/bold] ({result.nll:.4f} nats, {result.tokens:,} tokens)"
        )


def _only_for_models(ctx: click.Context, artefact: str) -> None:
    """Refuses options that say how to load a model: an artefact was compiled for its dtype and brings its program."""
    reasons = {
        "dtype": "it keeps the dtype that it was compiled for",
        "builder": "it brings its own program",
        "trust": "it brings no code",
    }
    for option, reason in reasons.items():
        if ctx.get_parameter_source(option) == click.core.ParameterSource.COMMANDLINE:
            name = "model" if option == "builder" else option
            raise click.UsageError(f"--{name} is for models, and {artefact} is an artefact: {reason}")


def read(file: Path) -> str | list[int]:
    """A UTF-8 text, or the token ids of a ``.npy`` file."""
    from ..lowering.text import read_tokens
    from ..passes.errors import LincompileError

    if file.suffix == ".npy":
        return read_tokens(file, None).tolist()
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LincompileError(f"{file} isn't UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise LincompileError(f"{file} can't be read: {error.strerror}") from error
    if not text.strip():
        raise LincompileError(f"{file} is empty")
    return text


def _student(
    directory: str, text: str | list[int], runtime: str, place: Ranks
) -> tuple[LogitsOf, list[int], int | None]:
    from ..lowering.evaluate import logits_of_session
    from .generate import open_session

    artefact = common.open_checked(directory, place.device)
    session = open_session(artefact, runtime, place, every_token=True)
    ids = text if isinstance(text, list) else artefact.tokenizer.encode(text)
    return logits_of_session(session, chunk=512 * place.world), ids, session.max_positions


def _teacher(
    model: str, text: str | list[int], builder: str | None, trust: bool, place: Ranks, dtype: str
) -> tuple[LogitsOf, list[int], int | None]:
    from ..lowering.evaluate import logits_of_program
    from ..lowering.tokenizer import codec_of
    from ..passes.errors import LincompileError

    loaded = common.load(model, builder=builder, trust=trust, device=place.device, dtype=dtype)
    if isinstance(text, list):
        ids = text
    elif loaded.tokenizer is None:
        raise LincompileError(f"{model} has no tokenizer, so a text has no tokens: give a .npy file of token ids")
    else:
        ids = codec_of(loaded.tokenizer).encode(text)
    program = common.captured(loaded)
    if place.shared:
        from ..lowering.sharded import logits_of_slices

        return logits_of_slices(program), ids, program.max_positions
    return logits_of_program(program), ids, program.max_positions
