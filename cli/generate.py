"""``lincompile generate DIR``: the prompt and its continuation on stdout, and nothing else there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import common

if TYPE_CHECKING:
    from ..lowering.generate import StepSession
    from ..lowering.package import Artefact


@click.command("generate")
@click.argument("directory", metavar="DIR")
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="File that holds the text to continue.")
@click.option("--prompt-ids", help="Token ids to continue, such as 12,7,99 (ids are printed back).")
@click.option("--chat", is_flag=True, help="The prompt is a question: apply the tokenizer's chat template.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Stop after so many.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 = greedy.")
@click.option("--top-k", type=int, default=0, help="Choose among the K likeliest (0 = all).")
@click.option("--top-p", type=float, default=1.0, help="Choose among the likeliest that make up P.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--runtime", type=click.Choice(["torch", "onnx"]), default="torch", show_default=True)
@common.device_option
@common.json_option
@common.verbose_option
def command(
    directory: str,
    prompt: str | None,
    prompt_file: Path | None,
    prompt_ids: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    runtime: str,
    device: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Continue a prompt with the artefact in DIR."""
    from ..lowering.generate import Sampling, generate
    from ..lowering.tokenizer import TextStream

    if sum(given is not None for given in (prompt, prompt_file, prompt_ids)) != 1:
        raise click.UsageError("give exactly one of --prompt, --prompt-file and --prompt-ids")
    Sampling(temperature, top_k, top_p, seed)  # before the seconds that opening takes
    artefact = common.open_checked(directory, device)
    ids, shown = _prompt(artefact, prompt, prompt_file, prompt_ids, chat)
    session = open_session(artefact, runtime)

    text = None if prompt_ids is not None else TextStream(artefact.tokenizer, ids)
    live = not as_json

    def emit(piece: str) -> None:
        if live and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def show(_: int, token: int) -> None:
        piece = f",{token}" if text is None else "" if token in artefact.eos_ids else text.push(token)
        pieces.append(piece)
        emit(piece)

    pieces: list[str] = []

    def begin() -> None:
        """Shows the prompt once it has been accepted: a refused one leaves stdout empty."""
        if not pieces:
            pieces.append(shown)
            emit(shown)

    def prefilled(done: int, total: int) -> None:
        begin()
        bars.update(task, completed=done, total=total)

    with common.progress() as bars:
        task = bars.add_task("reading the prompt", total=len(ids))
        bars.stop() if live and sys.stdout.isatty() else None
        result = generate(
            session,
            [ids],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_ids=artefact.eos_ids,
            stream=show,
            on_prefill=prefilled,
        )
    begin()
    if text is not None:
        pieces.append(text.rest())
        emit(pieces[-1])
    emit("\n")
    if as_json:
        common.print_json(
            {
                "text": None if text is None else "".join(pieces),
                "prompt_tokens": result.prompt_tokens[0],
                "tokens": result.tokens[0],
                "finish": result.finish[0],
                "prefill_tokens_per_second": result.prefill_tokens_per_second,
                "decode_tokens_per_second": result.decode_tokens_per_second,
            }
        )
    elif verbose:
        common.note(
            f"{result.prompt_tokens[0]} prompt tokens at {result.prefill_tokens_per_second:.0f}/s, "
            f"{len(result.tokens[0])} new at {result.decode_tokens_per_second:.1f}/s, ended by {result.finish[0]}"
        )


def _prompt(
    artefact: Artefact, prompt: str | None, file: Path | None, ids: str | None, chat: bool
) -> tuple[list[int], str]:
    """The prompt's token ids, and what stands for it on stdout."""
    from ..passes.errors import LincompileError

    if ids is not None:
        if chat:
            raise click.UsageError("--chat needs text: give --prompt or --prompt-file")
        try:
            return [int(item) for item in ids.split(",") if item.strip()], ids
        except ValueError:
            raise click.UsageError(f"--prompt-ids '{ids}': write whole numbers separated by commas") from None
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LincompileError(f"{file} isn't UTF-8 text (byte {error.start}): convert it first") from error
        except OSError as error:
            raise LincompileError(f"{file} can't be read: {error.strerror}") from error
    assert prompt is not None
    codec = artefact.tokenizer
    if chat:
        return codec.encode(codec.chat([{"role": "user", "content": prompt}])), ""
    tokens = codec.encode(prompt)
    if not tokens and (bos := codec.special_id("bos_token")) is not None:
        tokens = [bos]  # an empty prompt starts where every text does
    return tokens, prompt


def open_session(artefact: Artefact, runtime: str) -> StepSession:
    """The artefact's program on the chosen runtime."""
    if runtime == "torch":
        return artefact.session
    from ..lowering.onnx.session import OnnxSession
    from ..passes.errors import LincompileError

    folder = artefact.directory / "onnx"
    if not folder.is_dir():
        raise LincompileError(f"{artefact.directory} has no ONNX program: run 'lincompile export {artefact.directory}'")
    return OnnxSession(folder)
