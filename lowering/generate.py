"""Running a step program: chunked prefill, decoding with constant state, sampling, left-padded batches.

A *session* is anything with the members of :class:`StepSession`: the torch one below, or onnxruntime's. Whatever is
written here against that interface (``prefill``, ``generate``, ``lowering.evaluation.perplexity``) serves both.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ..passes.errors import LincompileError
from ..passes.stateful import StateSpec, StepProgram
from ..passes.stepping.last_token import last_token_only
from .chunks import GPU_CHUNK, PREFILL_CHUNK, gpu_chunk
from .recorded import Recorded, places_of, recordable
from .room import Room

# Where the arguments of a look-up hold the table (of a packed one, the plane that has its rows) and the ids.
TABLE_AND_IDS = {
    torch.ops.aten.embedding.default: (0, 1),
    torch.ops.lincompile.int6_embedding.default: (1, 0),
}
NO_STEP_FORM = (
    "the artefact runs whole sequences, without states (an encoder, or a model without a step form), so it can't "
    "generate: lincompile.open(DIR).step(tokens, positions, mask, []) gives its outputs"
)


class StepSession(Protocol):
    """What the generation loop needs of a runtime.

    Attributes:
        states: one spec per state, in the order of the state list.
        max_positions: the longest sequence, prompt and continuation together (None = unbounded).
        vocab_size: number of token ids the model knows.
        uniform_positions: the model counts positions itself, so all rows of a batch must be at the same one.
    """

    @property
    def states(self) -> Sequence[StateSpec]: ...

    @property
    def max_positions(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def uniform_positions(self) -> bool: ...

    def initial_states(self, batch: int) -> list[Tensor]:
        """Fresh states of ``batch`` rows: zeros, of length 0 on a growing axis."""
        ...

    def step(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One chunk: tokens, positions int64 and mask bool, all ``[B, t]`` → logits ``[B, t, V]`` float, new states."""
        ...


class Session:
    """The torch runtime of a step program.

    Args:
        step: the step program.
        vocab_size: number of token ids; read off the graph when not given.
        plain: the same program as it was before it was lowered, which has gradients.
    """

    def __init__(self, step: StepProgram, *, vocab_size: int | None = None, plain: StepProgram | None = None) -> None:
        self.program, self.plain = step, step if plain is None else plain
        tensors = [*step.graph_module.parameters(), *step.graph_module.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.vocab_size = vocab_size if vocab_size is not None else self._vocabulary()

    @property
    def chunk(self) -> int:
        """Tokens of a prompt to read at a time, by :meth:`step_last`."""
        return self._gpu_chunk if self.device.type == "cuda" else PREFILL_CHUNK

    @cached_property
    def _gpu_chunk(self) -> int:
        # Where all logits are computed they are the largest tensor by far. Lowering joins layers, and by that tensors:
        # what counts is the model's width, so the graph before it is asked.
        return GPU_CHUNK if self._last is None else gpu_chunk(self.plain)

    @property
    def states(self) -> list[StateSpec]:
        """One spec per state."""
        return self.program.states

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model accepts (None = unbounded)."""
        return self.program.max_positions

    @property
    def uniform_positions(self) -> bool:
        """Whether all rows of a batch must be at the same position."""
        return self.program.uniform_positions

    def _vocabulary(self) -> int:
        """Rows of the table that the tokens index, or the output's width where the graph has no such table."""
        nodes = list(self.program.graph_module.graph.nodes)
        tokens = nodes[0]
        for node in nodes:
            if node.op != "call_function" or node.target not in TABLE_AND_IDS:
                continue
            table_at, ids_at = TABLE_AND_IDS[node.target]
            if node.args[ids_at] is tokens:
                path = str(node.args[table_at].target)
                table: Tensor = operator.attrgetter(path)(self.program.graph_module)
                return table.shape[0]
        one = torch.zeros(1, 1, dtype=torch.int64)
        return self.step(one, one, one == 0, self.initial_states(1))[0].shape[-1]

    def initial_states(self, batch: int) -> list[Tensor]:
        """Zeros ``[batch, *spec.shape]`` per state; a growing axis starts at length 0."""
        return self.program.initial_states(batch, self.device)

    @torch.no_grad()
    def step(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one chunk; see :class:`StepSession`. The given states are not modified.

        On a GPU a step that comes again may be recorded as a CUDA graph (``lowering/recorded.py``).
        """
        if self._recorded is None:
            return self.advance(tokens, positions, mask, states)
        logits, *new = self._recorded([tokens, positions, mask, *states])
        return logits, new

    @cached_property
    def _recorded(self) -> Recorded | None:
        """Recordings of ``advance``; None where steps aren't to be recorded."""
        if type(self) is not Session or not recordable(self.program, self.device):
            return None  # what a session of another kind does in a step (exchange slices, say) is its own

        def run(inputs: list[Tensor]) -> list[Tensor]:
            logits, new = self.advance(inputs[0], inputs[1], inputs[2], inputs[3:])
            return [logits, *new]

        return Recorded(run, self.device, places_of(self.program.graph_module), growing=Room.of(self.program))

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have weights of their own: what was recorded or derived from these stays behind."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_recorded", "_last")}

    @cached_property
    def _last(self) -> Session | None:
        """The same program, for the last token's logits; None where it can't be had."""
        program = last_token_only(self.program)
        return None if program is None else Session(program, vocab_size=self.vocab_size)

    def step_last(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """:meth:`step`, but logits of the last token of the chunk may be all there are: ``[B, 1 or t, V]``."""
        session = self if tokens.shape[1] == 1 or self._last is None else self._last
        return session.step(tokens, positions, mask, states)

    def advance(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """:meth:`step`, with gradients where they are enabled."""
        on = self.device
        program = self.plain if torch.is_grad_enabled() else self.program
        logits, new = program(tokens.to(on), positions.to(on), mask.to(on), states)
        return logits, [self.program.trim(spec, state) for spec, state in zip(self.states, new, strict=True)]


def chunk_of(session: StepSession, all_logits: bool = False) -> int:
    """Tokens of a prompt to read at a time: what suits a session, where it says so (other runtimes don't).

    Not more than ``GPU_CHUNK`` where the logits of all of them are wanted.
    """
    chunk: int = getattr(session, "chunk", PREFILL_CHUNK)
    return min(chunk, GPU_CHUNK) if all_logits else chunk


def positions_of(mask: Tensor) -> Tensor:
    """Positions ``[B, T]`` of a left-padded batch: 0 for the first real token (and for the padding before it)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass
class Prefilled:
    """A prompt that has been read: the states after it, and the logits ``[B, V]`` that follow its last token."""

    logits: Tensor
    states: list[Tensor]
    lengths: Tensor  # int64 [B]: real tokens read so far
    model: str = ""  # identity of the artefact whose states these are, where it is known


def prefill(
    session: StepSession,
    tokens: Tensor,
    mask: Tensor,
    *,
    after: Prefilled | None = None,
    chunk: int | None = None,
    on_chunk: Callable[[int, int], None] | None = None,
    on_state: Callable[[Prefilled], None] | None = None,
    collect: Callable[[int, Tensor], None] | None = None,
) -> Prefilled:
    """Reads ``tokens [B, T]`` in chunks, from fresh states or ``after`` an earlier prefill.

    Args:
        mask: bool ``[B, T]``, True = real token. Padding must be on the left of each row.
        after: what an earlier call returned, to continue its sequences.
        chunk: tokens to read at a time (None: what suits the session's device and model).
        on_chunk: called with (tokens read, tokens in all) after each chunk.
        on_state: called after each chunk with what an interrupted prefill would be resumed from.
        collect: called with (index of the chunk's first token, logits ``[B, t, V]``): all logits, for perplexity.

    Raises:
        LincompileError: a chunk below 1, an empty prompt, a gap in a row's mask, an unknown token id, states of another
            batch size, or more tokens than ``session.max_positions``.
    """
    tokens, mask = tokens.cpu(), mask.cpu()  # what is counted here isn't worth waiting for a GPU
    batch, length = tokens.shape
    if chunk is not None and chunk < 1:
        raise LincompileError(f"chunk must be at least 1 token (or None: what suits the device), not {chunk}")
    if length == 0:
        raise LincompileError("the prompt is empty: give at least one token (the tokenizer's BOS token, for example)")
    if after is None and not bool(mask[:, -1].all()):
        row = int((~mask[:, -1]).nonzero()[0])
        raise LincompileError(f"row {row} of the batch is empty or padded on the right: pad prompts on the left")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise LincompileError("a row's mask has padding after a real token: pad prompts on the left")
    if session.uniform_positions and not bool(mask.all()):
        raise LincompileError(
            "this model counts positions itself, so prompts of different lengths can't share a batch: run them alone"
        )
    if after is not None:
        _check_continuation(session, after, batch, mask)
    check_vocabulary(session, tokens)
    before = torch.zeros(batch, dtype=torch.int64) if after is None else after.lengths
    total = int((before + mask.sum(-1)).max())
    if session.max_positions is not None and total > session.max_positions:
        raise LincompileError(
            f"the prompt has {total} tokens, the model accepts at most {session.max_positions}: shorten the prompt"
        )
    if not session.states:  # a whole-sequence program carries nothing from chunk to chunk
        if after is not None:
            raise LincompileError("the artefact runs whole sequences, without states: it can't continue one")
        chunk = length
    if chunk is None:
        chunk = chunk_of(session, all_logits=collect is not None)
    states = session.initial_states(batch) if after is None else after.states
    positions = positions_of(mask) + before[:, None]
    step = session.step if collect else getattr(session, "step_last", session.step)  # a runtime may have no shortcut
    logits: Tensor | None = None
    for start in range(0, length, chunk):
        part = slice(start, min(start + chunk, length))
        logits, states = step(tokens[:, part], positions[:, part], mask[:, part], states)
        if collect:
            collect(start, logits)
        if on_state:
            on_state(Prefilled(logits[:, -1], states, before + mask[:, : part.stop].sum(-1)))
        if on_chunk:
            on_chunk(part.stop, length)
    assert logits is not None
    return Prefilled(logits[:, -1], states, before + mask.sum(-1))


def _check_continuation(session: StepSession, after: Prefilled, batch: int, mask: Tensor) -> None:
    """Padding after tokens already read would enter convolutions and windows: refused, as are states that don't fit."""
    rows = after.lengths.shape[0]
    shapes = [(rows, *spec.shape) for spec in session.states]
    fit = len(shapes) == len(after.states) and all(
        len(shape) == state.dim()
        and all(n is None or n == size for n, size in zip(shape, state.shape, strict=True))
        and state.dtype == spec.dtype
        for shape, state, spec in zip(shapes, after.states, session.states, strict=True)
    )
    if not fit:
        raise LincompileError("the state is of another model: its tensors aren't those that this one carries")
    if rows != batch:
        raise LincompileError(
            f"the state holds {rows} sequences, the prompt {batch}: continue each row with one prompt"
        )
    if session.uniform_positions and bool((after.lengths != after.lengths[0]).any()):
        lengths = ", ".join(map(str, after.lengths.tolist()))
        raise LincompileError(
            f"this model counts positions itself, and the rows to continue are {lengths} tokens long: continue them "
            "one by one"
        )
    if bool((~mask.all(-1) & (after.lengths > 0)).any()):
        raise LincompileError(
            "rows that continue a state must get prompts of one length (padding would stand between their tokens): "
            "continue them one by one"
        )


def check_vocabulary(session: StepSession, tokens: Tensor) -> None:
    """An id outside the vocabulary would read past the embedding (an abort on a GPU): name it instead."""
    wrong = (tokens < 0) | (tokens >= session.vocab_size)
    if bool(wrong.any()):
        raise LincompileError(
            f"token id {int(tokens[wrong][0])} is outside the model's vocabulary (0 to {session.vocab_size - 1}): "
            "is this the model's own tokenizer?"
        )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 = greedy; ``top_k`` 0 and ``top_p`` 1 = off.

    Raises:
        LincompileError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what has no meaning (a negative temperature is not a small one)."""
        if not 0 <= self.temperature < float("inf"):
            raise LincompileError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise LincompileError(f"top_k must be 0 (off) or a positive count, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise LincompileError(f"top_p must be above 0 and at most 1 (off), not {self.top_p}")
        if self.temperature == 0 and (self.top_k > 1 or self.top_p < 1):
            raise LincompileError(
                "temperature 0 is greedy, and top_k and top_p change nothing then: give a temperature"
            )


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next tokens int64 ``[B]`` from logits ``[B, V]``; row i draws from ``generators[i]`` alone.

    Raises:
        LincompileError: NaN, or no finite largest logit: continuing would print noise as if it were text. A model may
            give −inf to what it never says.
    """
    logits = logits.detach()
    largest, tokens = logits.max(-1)  # NaN where any is
    # On the logits' device, and brought over in one piece: nothing else waits for the GPU in a step.
    tokens, sound = torch.stack((tokens, torch.isfinite(largest).long())).cpu().unbind()
    if not bool(sound.all()):
        raise LincompileError("the model's logits are not finite (NaN or inf): the artefact or its state is damaged")
    if sampling.temperature == 0:
        return tokens
    logits = logits.to("cpu", torch.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # The token that crosses top_p stays, so at least one always does.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(dropped, 0.0))
    rows = [torch.multinomial(row, 1, generator=source) for row, source in zip(probabilities, generators, strict=True)]
    return torch.cat(rows)


@dataclass
class Generation:
    """What :func:`generate` returns.

    Attributes:
        tokens: the new tokens of each row, without the prompt; an end-of-sequence token is included.
        finish: ``"eos"``, ``"length"`` (``max_new_tokens`` reached), ``"max_positions"`` or ``"stopped"`` (by
            ``stream``) per row.
        prompt_tokens: real tokens of each prompt.
        prefill_seconds, decode_seconds: wall time of the two phases.
        state: the states after the last token read, so that the conversation can continue: the last new token has not
            been read yet, so it begins the next prompt. (A row that ended early in a model with kept sliding windows
            has padding in its window: continue such rows from a batch of their own.)
    """

    tokens: list[list[int]]
    finish: list[str]
    prompt_tokens: list[int]
    prefill_seconds: float
    decode_seconds: float
    state: Prefilled = field(repr=False)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens (all rows) per second."""
        return sum(self.prompt_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens (all rows) per second; the first of each row comes from the prefill and doesn't count."""
        return sum(max(len(row) - 1, 0) for row in self.tokens) / max(self.decode_seconds, 1e-9)


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[B, T]`` of prompts of different lengths, padded on the left with id 0 (masked out)."""
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            where = f"prompt {row} of the batch" if len(prompts) > 1 else "the prompt"
            raise LincompileError(f"{where} is empty: give at least one token (the tokenizer's BOS token, for example)")
    if not prompts:
        raise LincompileError("there is no prompt: give at least one")
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.int64)
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return tokens, mask


def generate(
    session: StepSession,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    chunk: int | None = None,
    after: Prefilled | None = None,
    stream: Callable[[int, int], bool | None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    on_state: Callable[[Prefilled], None] | None = None,
) -> Generation:
    """Continues token sequences, one or a batch; each row gives what it would give alone.

    Args:
        prompts: token ids of each row.
        max_new_tokens: stop after that many (0 reads the prompt and returns no token).
        temperature, top_k, top_p, seed: see :class:`Sampling`; row i is seeded with ``seed + i``.
        eos_ids: a row stops after any of these.
        chunk: prompt tokens per step of the prefill (None: what suits the session's device and model).
        after: the states of an earlier call (``Generation.state``, or a state file's): the prompts are what comes next.
            Where nothing does, ``[[]]`` continues from its logits.
        stream: called with (row, token) as each token is chosen; True ends the row (a stop sequence, for example).
        on_prefill: called with (tokens read, tokens in all) while the prompt is read.
        on_state: called with the state after each chunk of the prompt.

    Raises:
        LincompileError: an empty or too long prompt, an unknown token id, a value out of range, logits not finite.
    """
    if max_new_tokens < 0:
        raise LincompileError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if not session.states:
        raise LincompileError(NO_STEP_FORM)
    sampling = Sampling(temperature, top_k, top_p, seed)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    started = time.perf_counter()
    if after is not None and not any(prompts):
        _check_continuation(session, after, len(prompts), torch.ones(len(prompts), 0, dtype=torch.bool))
        state = after
    else:
        tokens, mask = left_pad(prompts)
        state = prefill(session, tokens, mask, after=after, chunk=chunk, on_chunk=on_prefill, on_state=on_state)
    prefilled = time.perf_counter()

    rows: list[list[int]] = [[] for _ in prompts]
    finish = ["length"] * len(prompts)
    active = torch.ones(len(prompts), dtype=torch.bool)
    for index in range(max_new_tokens):
        chosen = choose(state.logits, sampling, generators)
        for row in active.nonzero().flatten().tolist():
            token = int(chosen[row])
            rows[row].append(token)
            stop = stream is not None and stream(row, token) is True
            if token in eos_ids:
                active[row], finish[row] = False, "eos"
            elif stop:
                active[row], finish[row] = False, "stopped"
            elif session.max_positions is not None and int(state.lengths[row]) >= session.max_positions:
                active[row], finish[row] = False, "max_positions"
        if not bool(active.any()) or index == max_new_tokens - 1:
            break
        state = _decode(session, chosen, active, state)
    lengths = [len(prompt) for prompt in prompts]
    return Generation(rows, finish, lengths, prefilled - started, time.perf_counter() - prefilled, state)


def _decode(session: StepSession, chosen: Tensor, active: Tensor, state: Prefilled) -> Prefilled:
    """Feeds one token per row; rows that have finished feed padding, so their states stay as they are."""
    tokens = torch.where(active, chosen, 0)[:, None]
    # A finished row stands where the furthest active one does: a valid position, and the same one where it must be.
    positions = torch.where(active, state.lengths, state.lengths[active].max())[:, None]
    logits, states = session.step(tokens, positions, active[:, None], state.states)
    if not bool(active.all()):  # a convolution would take the padding for a token
        states = [
            new if None in spec.shape else torch.where(active.to(new.device).view(-1, *[1] * (new.dim() - 1)), new, old)
            for spec, new, old in zip(session.states, states, state.states, strict=True)
        ]
    return Prefilled(logits[:, -1], states, state.lengths + active)
