"""An artefact or a model as a model of EleutherAI's lm-evaluation-harness (``lm_eval``), offline.

Log-likelihoods come from the step program itself, the teacher's (with a KV cache) as the student's: a context is read
once, in chunks, and its state serves every continuation that follows it (the choices of a question).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...passes.errors import LincompileError
from ..generate import generate
from .score import Answer, Scorer
from .subject import open_subject

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise LincompileError("lincompile.lm_eval needs lm-eval: pip install 'lincompile[eval]'") from error

_log = logging.getLogger(__name__)
DEFAULT_LENGTH = 2048  # tokens per window of rolling perplexity, where the model doesn't bound its positions
DEFAULT_NEW_TOKENS = 256


@register_model("lincompile")
class LincompileLM(TemplateLM):  # type: ignore[misc]
    """``lm_eval --model lincompile --model_args path=MODEL_OR_DIR``.

    Args:
        path: an artefact folder with a tokenizer, or anything the CLI takes as MODEL.
        runtime: ``torch`` or ``onnx`` (after ``lincompile export``).
        device: where the torch runtime runs. lm_eval asks for CUDA by default: where there is none, a warning says
            that the CPU is used.
        max_length: tokens per window; by default the model's positions, or 2048.
        batch_size: 1: a context's state is reused for its continuations (on a CPU). More: so many sequences at a time
            (on a GPU). ``auto`` is 1.
        max_batch_size: accepted because lm_eval always passes it.

    Raises:
        LincompileError: no model, no tokenizer, a model without states, an unknown option.
    """

    def __init__(
        self,
        path: str,
        runtime: str = "torch",
        device: str | None = None,
        max_length: int | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise LincompileError(
                f"--model_args has no '{sorted(unknown)[0]}' for lincompile; it takes path, runtime, device, max_length"
            )
        self.subject = open_subject(path, runtime=runtime, device=_device(device), note=_log.warning)
        if not self.subject.session.states:
            raise LincompileError(f"{path} runs whole sequences, without states: it isn't a language model to evaluate")
        self.codec = self.subject.tokenizer("an evaluation task")
        self.session = self.subject.session
        limit = self.session.max_positions
        self.max_length = min(int(max_length or limit or DEFAULT_LENGTH), limit or 1 << 62)
        self.batch = int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 0 else 1
        self.scorer = Scorer(self.session, self.max_length, self.subject.chunk)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which stands in front of texts without a context."""
        ends = self.subject.eos_ids
        token = ends[0] if ends else self.codec.special_id("bos_token")
        if token is None:
            raise LincompileError(f"{self.subject.name} names neither an end-of-text nor a BOS token")
        return token

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on: BOS where there is one."""
        token = self.codec.special_id("bos_token")
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """What tells cached requests of different tokenizers apart."""
        return str(Path(self.subject.name).resolve())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with what the tokenizer itself adds, but no second BOS."""
        ids = self.codec.encode(string, special=add_special_tokens is not False)
        bos = self.codec.special_id("bos_token")
        return ids[1:] if add_special_tokens is None and bos is not None and ids[:2] == [bos, bos] else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, by the model's own template."""
        if not add_generation_prompt:
            raise LincompileError("the chat template is applied up to where the model answers: no prefilled answers")
        return self.codec.chat(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which lm_eval records."""
        return self.codec.chat_template if chat_template else None

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        def cache(index: int, answer: Answer) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)

        return self.scorer.score([request[1:] for request in requests], self.batch, cache)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that don't overlap."""
        answers = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = [utils.make_disjoint_window(window) for window in windows]
            answers.append(sum(score for score, _ in self.scorer.score(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled continuations, up to the first stop sequence."""
        return [self._generate(request) for request in requests]

    def _generate(self, request: Any) -> str:
        context, given = request.args
        options = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        until = [stop for stop in options.pop("until", []) if stop]
        new = int(options.pop("max_gen_toks", DEFAULT_NEW_TOKENS))
        options.pop("do_sample", None)
        sampling = {name: options.pop(name) for name in ("temperature", "top_k", "top_p") if name in options}
        if options:
            raise LincompileError(f"generation option '{sorted(options)[0]}' isn't supported")
        if new >= self.max_length:
            raise LincompileError(
                f"{new} new tokens leave no room for a prompt in {self.max_length}: lower the task's max_gen_toks, or "
                "raise max_length"
            )
        ids = self.tok_encode(context)[-(self.max_length - new) :] or [self.eot_token_id]
        produced: list[int] = []

        def stopped(_: int, token: int) -> bool:
            produced.append(token)
            text = self.codec.decode(produced)
            return any(stop in text for stop in until)

        generate(self.session, [ids], new, eos_ids=self.subject.eos_ids, stream=stopped, **sampling)
        text = self.codec.decode(produced)
        answer: str = postprocess_generated_text(text, until, None)
        self.cache_hook.add_partial("generate_until", request.args, answer)
        return answer


def _device(asked: str | None) -> str:
    if asked is None or (asked.startswith("cuda") and not torch.cuda.is_available()):
        if asked is not None:
            _log.warning("no CUDA device on this machine: '%s' becomes 'cpu'", asked)
        return "cpu"
    return asked
