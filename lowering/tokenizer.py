"""Text ↔ token ids for an artefact, from its ``tokenizer.json``, without transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..passes.errors import LincompileError

NEEDS = "text needs the 'tokenizers' package: pip install 'lincompile[hf]', or give token ids"


class TextCodec:
    """The tokenizer of an artefact folder.

    Args:
        directory: a folder with ``tokenizer.json`` (and ``tokenizer_config.json`` for names and the chat template).

    Raises:
        LincompileError: there is no tokenizer, it is damaged, or ``tokenizers`` isn't installed.
    """

    def __init__(self, directory: Path) -> None:
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise LincompileError(f"{directory} has no tokenizer.json: give token ids instead of text")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise LincompileError(NEEDS) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise LincompileError(f"{file} can't be read: {error}") from error
        self._directory = directory

    @cached_property
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``, or nothing where there is none."""
        file = self._directory / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return config

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``, with the special tokens that the tokenizer itself adds (unless ``special`` is off).

        Raises:
            LincompileError: text that isn't Unicode, as bytes of another encoding become on a command line.
        """
        return list(self._tokenizer.encode(valid(text, "the text"), add_special_tokens=special).ids)

    def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """``encode`` of each text, on all processors."""
        return [list(found.ids) for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def special_id(self, name: str) -> int | None:
        """The id of ``"bos_token"``, ``"eos_token"``, … (None where the tokenizer has no such token)."""
        value = self.config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        return None if content is None else self._tokenizer.token_to_id(content)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template that turns a conversation into a prompt (None where there is none)."""
        file = self._directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        return template if isinstance(template, str) else None

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation (``[{"role": "user", "content": …}]``), ending where the model answers.

        Raises:
            LincompileError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        if self.chat_template is None:
            raise LincompileError("the tokenizer has no chat template: leave --chat out")
        from jinja2 import TemplateError  # a dependency of torch
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        names = {name: _content(self.config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=list(messages), add_generation_prompt=True, **names)
        except TemplateError as error:
            raise LincompileError(f"the chat template refuses the conversation: {error}") from error


def valid(text: str, where: str) -> str:
    """The text, if a tokenizer can read it: a half of a surrogate pair, which JSON and ``sys.argv`` let through, can't.

    Raises:
        LincompileError: it holds one; ``where`` is named.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LincompileError(
            f"{where} isn't valid Unicode: character {error.start + 1} is {text[error.start]!r}, half of a pair or a "
            "byte of another encoding; write it as UTF-8"
        ) from None
    return text


def _content(value: Any) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    return content or ""


class TextStream:
    """Turns tokens that arrive one by one into text, holding back half a character (bytes of one UTF-8 sequence).

    Only a short tail is decoded for each token: what the tail says with the new token, less what it said before.
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int] = ()) -> None:
        self._codec = codec
        self._ids = list(prompt)[-8:]  # some decoders treat the first token of a text differently: keep a few before
        self._start = 0
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """The text that ``token`` completes (possibly empty)."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return new

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._new_text() if self._shown < len(self._ids) else ""

    def _new_text(self) -> str:
        before = self._codec.decode(self._ids[self._start : self._shown])
        return self._codec.decode(self._ids[self._start :])[len(before) :]


def codec_of(write: Callable[[Path], None]) -> TextCodec:
    """The tokenizer that ``write(folder)`` saves (as a loaded model offers it), without keeping the folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        codec = TextCodec(Path(folder))
        _ = codec.config, codec.chat_template  # read before the folder goes
        return codec
