"""``lincompile eval MODEL_OR_DIR``: perplexity, passkey retrieval and what it writes, by one code path for all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import common

if TYPE_CHECKING:
    from ..lowering.evaluation.perplexity import LogitsOf
    from ..lowering.evaluation.subject import Subject
    from ..lowering.sharded import Ranks

HAYSTACK = Path(__file__).resolve().parent / "data" / "demo-heldout.txt"
# Options that mean something for one kind of evaluation only; the kind is an option, or perplexity's --text.
BELONGS = {
    "context": "text_file",
    "tokens": "text_file",
    "shard": "text_file",
    "lengths": "passkey",
    "depths": "passkey",
    "trials": "passkey",
    "haystack": "passkey",
    "seed": "passkey",
    "extrapolate": "passkey",
    "plot": "passkey",
    "prompts": "against",
    "prompt_tokens": "against",
    "new_tokens": "against",
}
KINDS = {"text_file": "--text without --against", "passkey": "--passkey", "against": "--against"}


def lengths(value: str) -> tuple[int, ...]:
    """Counts separated by commas: ``1K,2K,4096``; the same one twice is one."""
    return tuple(dict.fromkeys(common.count(item) for item in value.split(",")))


def depths(value: str) -> tuple[float, ...]:
    """A number of depths (``5``), or percentages separated by commas (``0,50,100`` or ``50%``)."""
    if re.fullmatch(r"\d{1,4}", value.strip()):
        if int(value) < 1:
            raise click.BadParameter(f"'{value}' depths: at least one")
        from ..lowering.evaluation.passkey import spaced

        return spaced(int(value))
    found = [re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%?", item.strip()) for item in value.split(",")]
    shares = [float(match[1]) / 100 for match in found if match]
    if len(shares) < len(found) or max(shares) > 1:
        raise click.BadParameter(f"'{value}' is neither a number of depths (5) nor percentages such as 0,50,100")
    return tuple(dict.fromkeys(shares))


@click.command("eval")
@click.argument("model", metavar="MODEL_OR_DIR")
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    help="The text to predict, or to take prompts from (files as for --distil).",
)
@click.option("--context", type=common.count, default="1024", show_default=True, help="Tokens per window.")
@click.option("--tokens", type=common.count, help="Stop after so many predicted tokens.")
@click.option("--passkey", is_flag=True, help="Hide a number in a long text and ask for it, at many lengths.")
@click.option("--lengths", type=lengths, default="1K,2K,4K", show_default=True, help="Tokens per prompt.")
@click.option("--depths", type=depths, default="5", show_default=True, help="How many, or percentages: 0,50,100.")
@click.option("--trials", type=common.count, default="3", show_default=True, help="Keys per length and depth.")
@click.option("--haystack", type=click.Path(path_type=Path), help="Text to hide the key in.  [default: one that ships]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the keys.")
@click.option("--extrapolate", is_flag=True, help="Go beyond the positions that the model's configuration names.")
@click.option("--plot", type=click.Path(path_type=Path), help="File for the heat map: .html, .png, .svg or .pdf.")
@click.option("--against", metavar="MODEL_OR_DIR", help="Compare greedy continuations of --text with this teacher's.")
@click.option("--prompts", type=common.count, default="16", show_default=True, help="Continuations to compare.")
@click.option("--prompt-tokens", type=common.count, default="64", show_default=True)
@click.option("--new-tokens", type=common.count, default="64", show_default=True)
@click.option("--runtime", type=click.Choice(["torch", "onnx"]), default="torch", show_default=True)
@common.shard_option("Share the tokens of each window")
@common.model_options
@common.json_option
@common.verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    text_file: Path | None,
    context: int,
    tokens: int | None,
    passkey: bool,
    lengths: tuple[int, ...],
    depths: tuple[float, ...],
    trials: int,
    haystack: Path | None,
    seed: int,
    extrapolate: bool,
    plot: Path | None,
    against: str | None,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    runtime: str,
    builder: str | None,
    trust: bool,
    device: str,
    dtype: str,
    shard: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Perplexity over non-overlapping windows of a text, no BOS added.

    With --passkey: retrieval from long texts. With --against TEACHER: what the model writes, compared with the
    teacher's.
    """
    _check_kind(ctx, text_file, passkey, against)
    if shard and runtime != "torch":
        raise click.UsageError("--shard goes with --runtime torch")
    if common.is_artefact(model):
        if against is None or common.is_artefact(against):
            _only_for_models(ctx, model)
    elif runtime != "torch":
        raise click.UsageError("--runtime onnx needs an artefact folder")

    def opened(name: str) -> Subject:
        return subject(name, runtime if name == model else "torch", builder, trust, device, dtype)

    if passkey:
        from ..lowering.evaluation.passkey import Passkey
        from . import heat_map, retrieval

        options = Passkey(lengths, depths, trials, seed=seed)
        if plot is not None:
            heat_map.check(plot)
        retrieval.show(opened, model, read(haystack or HAYSTACK), options, extrapolate, plot, as_json)
        return
    assert text_file is not None
    text = read(text_file)
    if against is not None:
        from ..lowering.evaluation.agreement import Writing
        from . import writing

        writing.show(opened, model, against, text, Writing(prompts, prompt_tokens, new_tokens), as_json)
        return
    with common.ranks(shard, device) as place:
        if common.is_artefact(model):
            measure(*_student(model, text, runtime, place), context, tokens, as_json)
        else:  # every rank's logits are those of its slice
            measure(*_teacher(model, text, builder, trust, place, dtype), context, tokens, as_json, place.total)


def _check_kind(ctx: click.Context, text_file: Path | None, passkey: bool, against: str | None) -> None:
    """One kind of evaluation, and only options that belong to it."""
    if passkey and (text_file is not None or against is not None):
        raise click.UsageError("--passkey is an evaluation of its own: leave --text and --against out (see --haystack)")
    if text_file is None and not passkey:
        raise click.UsageError("Missing option '--text' (or --passkey).")
    kind = "passkey" if passkey else "against" if against is not None else "text_file"
    for option, belongs in BELONGS.items():
        if belongs != kind and ctx.get_parameter_source(option) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{option.replace('_', '-')} goes with {KINDS[belongs]}")


def subject(name: str, runtime: str, builder: str | None, trust: bool, device: str, dtype: str) -> Subject:
    """An artefact or a model behind one interface, with spinners and notes on stderr."""
    from ..lowering.evaluation.subject import of_artefact, of_model
    from .generate import open_session

    if common.is_artefact(name):
        artefact = common.open_checked(name, device)
        return of_artefact(artefact, open_session(artefact, runtime))
    loaded = common.load(name, builder=builder, trust=trust, device=device, dtype=dtype)
    program = common.captured(loaded)
    with common.working("proving, and deriving the step form"):
        return of_model(loaded, program, name)


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
    from ..lowering.evaluation.perplexity import perplexity

    if limit is not None and context > limit:
        raise click.UsageError(f"--context {context}: the model accepts at most {limit} positions")
    with common.counting("predicting tokens") as advance:
        result = perplexity(logits_of, ids, context, tokens=tokens, on_window=advance, add_up=add_up)
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
    """A text, documents of a table one after another; or the token ids of a ``.npy`` file."""
    from ..lowering.text import holds_ids, read_text, read_tokens

    return read_tokens(file, None).tolist() if holds_ids(file) else read_text(file)


def _student(
    directory: str, text: str | list[int], runtime: str, place: Ranks
) -> tuple[LogitsOf, list[int], int | None]:
    from ..lowering.evaluation.perplexity import logits_of_session
    from .generate import open_session

    artefact = common.open_checked(directory, place.device)
    session = open_session(artefact, runtime, place, every_token=True)
    ids = text if isinstance(text, list) else artefact.tokenizer.encode(text, special=False)
    return logits_of_session(session, chunk=512 * place.world), ids, session.max_positions


def _teacher(
    model: str, text: str | list[int], builder: str | None, trust: bool, place: Ranks, dtype: str
) -> tuple[LogitsOf, list[int], int | None]:
    import torch

    from ..lowering.evaluation.perplexity import logits_of_program
    from ..lowering.tokenizer import codec_of
    from ..passes.distil.recipe import check_tokens
    from ..passes.errors import LincompileError

    loaded = common.load(model, builder=builder, trust=trust, device=place.device, dtype=dtype)
    if isinstance(text, list):
        ids = text
    elif loaded.tokenizer is None:
        raise LincompileError(f"{model} has no tokenizer, so a text has no tokens: give a .npy file of token ids")
    else:
        ids = codec_of(loaded.tokenizer).encode(text, special=False)
    program = common.captured(loaded)
    check_tokens(program, torch.tensor(ids))
    if place.shared:
        from ..lowering.sharded import logits_of_slices

        return logits_of_slices(program), ids, program.max_positions
    return logits_of_program(program), ids, program.max_positions
