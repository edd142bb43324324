"""``lincompile generate DIR``: the prompt and its continuation on stdout, and nothing else there."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import common

if TYPE_CHECKING:
    from ..lowering.artefact.state_file import SavedState
    from ..lowering.generate import Prefilled, Sampling, StepSession
    from ..lowering.package import Artefact
    from ..lowering.sharded import Ranks


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
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--save-state",
    type=click.Path(path_type=Path),
    help="File for the state after the prompt (a prompt cache); an interrupted reading of the prompt goes on from it.",
)
@click.option(
    "--load-state",
    type=click.Path(path_type=Path),
    help="State to start from; the prompt is what follows, or all of it.",
)
@common.shard_option("Share the reading of the prompt")
@common.runtime_option
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
    save_state: Path | None,
    load_state: Path | None,
    shard: str | None,
    runtime: str,
    device: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Continue a prompt with the artefact in DIR."""
    from ..lowering.generate import Sampling

    given = sum(option is not None for option in (prompt, prompt_file, prompt_ids))
    if given > 1 or (given == 0 and load_state is None):
        raise click.UsageError("give exactly one of --prompt, --prompt-file and --prompt-ids (none with --load-state)")
    if shard and runtime != "torch":
        raise click.UsageError("--shard goes with --runtime torch")
    sampling = Sampling(temperature, top_k, top_p, seed)  # before the seconds that opening takes
    with common.ranks(shard, device) as place:
        prompts = (prompt, prompt_file, prompt_ids, chat)
        continue_prompt(
            directory, prompts, max_new_tokens, sampling, save_state, load_state, runtime, place, as_json, verbose
        )


def continue_prompt(
    directory: str,
    prompts: tuple[str | None, Path | None, str | None, bool],
    max_new_tokens: int,
    sampling: Sampling,
    save_state: Path | None,
    load_state: Path | None,
    runtime: str,
    place: Ranks,
    as_json: bool,
    verbose: bool,
) -> None:
    """Reads one of (``--prompt``, ``--prompt-file``, ``--prompt-ids``, ``--chat``) on all ranks; the first goes on."""
    from ..lowering.generate import chunk_of, generate
    from ..lowering.tokenizer import TextStream

    prompt, prompt_file, prompt_ids, chat = prompts
    given = any(item is not None for item in prompts[:3])
    artefact = common.open_checked(directory, place.device)
    session = open_session(artefact, runtime, place)
    states = StateFiles(artefact, session, runtime, load=load_state, save=save_state, writes=place.first)
    ids, shown = _prompt(artefact, prompt, prompt_file, prompt_ids, chat) if given else ([], "")
    if states.loaded is not None:
        ids = _after(states.loaded, artefact, ids, shown if given and prompt_ids is None and not chat else None)
    else:
        ids = states.resumed(ids)
    place.wait()  # all have seen the files before the first writes one

    as_ids = prompt_ids is not None or (not given and not artefact.has_tokenizer)
    text = None if as_ids else TextStream(artefact.tokenizer, ids)
    live = not as_json

    def emit(piece: str) -> None:
        if live and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def show(_: int, token: int) -> None:
        begin()
        if text is None:
            piece = f",{token}" if any(pieces) else str(token)
        else:
            piece = "" if token in artefact.eos_ids else text.push(token)
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
        with states.saving(ids):
            result = generate(
                session,
                [ids],
                max_new_tokens if place.first else 0,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=sampling.seed,
                eos_ids=artefact.eos_ids,
                chunk=chunk_of(session) * place.world,
                after=states.loaded.state if states.loaded is not None else None,
                stream=show,
                on_prefill=prefilled,
                on_state=states.keep,
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
                "state_tokens": states.tokens_before,
                "tokens": result.tokens[0],
                "finish": result.finish[0],
                "prefill_tokens_per_second": result.prefill_tokens_per_second,
                "decode_tokens_per_second": result.decode_tokens_per_second,
            }
        )
        return
    if result.finish[0] == "max_positions":
        common.note(f"stopped at the model's {session.max_positions} positions")
    if verbose:
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
            numbers = [int(item) for item in ids.split(",") if item.strip()]
            if big := [number for number in numbers if abs(number) >= 1 << 31]:
                raise click.UsageError(f"--prompt-ids: {big[0]} is no token id")
            return numbers, ids
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


def _after(loaded: SavedState, artefact: Artefact, ids: list[int], text: str | None) -> list[int]:
    """The token ids still to be read after a loaded state; says on stderr what the state took the place of."""
    read = int(loaded.state.lengths[0])
    unread, again = loaded.unread(ids)
    if again and read:
        common.note(f"the state has read the first {read} tokens of the prompt already: {len(unread)} are left")
        return unread
    common.note(f"continuing after {read} tokens")
    return ids if text is None else artefact.tokenizer.encode(text, special=False)


class StateFiles:
    """``--load-state`` and ``--save-state``: what a prompt's state starts from and where it is kept."""

    SHARE = 20  # at most one part in so many of the time goes into saving while a prompt is being read

    def __init__(
        self,
        artefact: Artefact,
        session: StepSession,
        runtime: str,
        *,
        load: Path | None,
        save: Path | None,
        writes: bool = True,
    ) -> None:
        from ..lowering.artefact.state_file import check_destination
        from ..passes.errors import LincompileError

        self._artefact, self._specs, self._runtime, self._file = artefact, session.states, runtime, save
        if save is not None and not save.absolute().parent.is_dir():
            raise LincompileError(f"--save-state {save}: the folder {save.parent} doesn't exist")
        if save is not None:
            check_destination(save)
        self.loaded: SavedState | None = None if load is None else self._load(load)
        self._writes = writes  # the first of several ranks does
        self._again = load is None  # the same command finds what it has saved
        self._last: Prefilled | None = None
        self._written, self._cost = 0.0, 0.0  # when, and how many seconds it took

    def _load(self, file: Path) -> SavedState:
        from ..lowering.artefact.state_file import load_state

        return load_state(
            file,
            model=self._artefact.identity,
            runtime=self._runtime,
            specs=self._specs,
            batch=1,
            device=self._artefact.device,
        )

    @property
    def tokens_before(self) -> int:
        """How many tokens the state holds that generation starts from."""
        return 0 if self.loaded is None else int(self.loaded.state.lengths[0])

    def resumed(self, prompt: list[int]) -> list[int]:
        """What is left of a prompt whose reading was interrupted while it was being saved; all of it otherwise."""
        from ..passes.errors import LincompileError

        if self._file is None or not self._file.exists():
            return prompt
        try:
            found = self._load(self._file)
            left, again = found.unread(prompt)
        except LincompileError as reason:  # of another model or prompt, or damaged: it is replaced, as any older state
            common.note(f"{reason}; the file will be replaced")
            return prompt
        if found.complete or not again:
            return prompt
        self.loaded = found
        common.note(f"{self._file} has the first {self.tokens_before} tokens of this prompt: {len(left)} are left")
        return left

    def keep(self, state: Prefilled) -> None:
        """A chunk has been read: written when it was the last, and before that as often as costs little."""
        self._last = state
        done = int(state.lengths[0]) - self.tokens_before == len(self._prompt)
        if self._file is not None and (done or time.monotonic() - self._written > self.SHARE * self._cost):
            self._write(complete=done)

    @contextmanager
    def saving(self, prompt: list[int]) -> Iterator[None]:
        """While ``prompt`` is read: an interruption keeps what has been read."""
        self._prompt = prompt
        self._hashed = (0, self.loaded.hashes[0] if self.loaded is not None else "")
        if self._file is not None and not prompt:
            self._last = self.loaded.state if self.loaded is not None else None
            self._write(complete=True)
        try:
            yield
        except BaseException:
            if self._file is not None and self._last is not None and self._writes:
                self._write(complete=False)
                again = "the same command goes on from there, or resume" if self._again else "resume"
                common.note(f"what has been read is in {self._file}: {again} with --load-state {self._file}")
            raise

    def _write(self, complete: bool) -> None:
        from ..lowering.artefact.state_file import SavedState, running_hash, save_state

        if self._last is None or self._file is None or not self._writes:
            return
        started = time.monotonic()
        read, (before, digest) = int(self._last.lengths[0]) - self.tokens_before, self._hashed
        self._hashed = (read, running_hash(self._prompt[before:read], digest))
        hashes = [self._hashed[1]]
        saved = SavedState(self._last, self._artefact.identity, self._runtime, hashes, complete)
        save_state(self._file, saved, self._specs)
        self._written = time.monotonic()
        self._cost = self._written - started
        if complete:
            self._last = None  # nothing more to keep


def open_session(
    artefact: Artefact, runtime: str, place: Ranks | None = None, *, every_token: bool = False
) -> StepSession:
    """The artefact's program on the chosen runtime; on several ranks, with the logits of every token if asked for."""
    if place is not None and place.shared:
        from ..lowering.sharded import ShardedSession

        return ShardedSession(artefact.step, vocab_size=artefact.manifest["vocab_size"], every_token=every_token)
    from ..lowering.evaluation.subject import session_of

    return session_of(artefact, runtime)
