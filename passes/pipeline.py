"""Passes and pipelines: a pass is a frozen dataclass with ``run``; a pipeline runs passes and checks between them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from .errors import LincompileError, PassError
from .program import Program


@dataclass
class PassResult:
    """What a pass returns: the program, whether its graph changed, and a JSON-able report of what changed."""

    program: Program
    modified: bool
    report: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Pass(Protocol):
    """A compiler pass. Implementations are frozen dataclasses whose fields are the pass's options."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> PassResult: ...


REGISTRY: dict[str, Callable[[], type[Any]]] = {}


def register(name: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: makes a pass available to pipeline text under ``name``."""

    def add(cls: type[Any]) -> type[Any]:
        REGISTRY[name] = lambda: cls
        return cls

    return add


class Pipeline:
    """Runs passes in order and verifies the graph after each one that modified it.

    Args:
        passes: pass objects, or pipeline text such as ``"canonicalize,linearize{attn=lawcat}"``.
        trace: keep the graph's text in ``.dumps``, as ("before", text) and then (pass name, text) after every pass.
        on_pass: called with (index, total, pass name) before each pass, for progress bars.

    Raises:
        PassError: a pass broke an op contract or failed on its own code; the message names it and the node.
    """

    def __init__(
        self,
        passes: Sequence[Pass] | str,
        *,
        trace: bool = False,
        on_pass: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.passes: list[Pass] = parse(passes) if isinstance(passes, str) else list(passes)
        self.trace = trace
        self.on_pass = on_pass
        self.dumps: list[tuple[str, str]] = []

    def __call__(self, program: Program) -> Program:
        from .listing import listing
        from .verify import verify

        self.dumps = [("before", "\n".join(listing(program)))] if self.trace else []
        for index, item in enumerate(self.passes):
            if self.on_pass:
                self.on_pass(index, len(self.passes), item.name)
            started = time.monotonic()
            try:
                with torch.inference_mode(False), torch.enable_grad():  # proofs compare gradients, wherever they run
                    result = item.run(program)
            except LincompileError:
                raise
            except Exception as error:
                raise PassError(f"pass '{item.name}' failed: {type(error).__name__}: {error}") from error
            program = result.program
            problem = verify(program)
            if problem:
                raise PassError(f"pass '{item.name}' broke the graph: {problem}")
            program.history.append(
                {
                    "pass": item.name,
                    "options": options_of(item),
                    "modified": result.modified,
                    "seconds": round(time.monotonic() - started, 3),
                    "report": result.report,
                }
            )
            if self.trace:
                self.dumps.append((item.name, "\n".join(listing(program))))
        return program

    def __str__(self) -> str:
        return ",".join(format_pass(item) for item in self.passes)


def options_of(item: Any) -> dict[str, Any]:
    """The options of a pass that text can carry: its fields, less those that hold objects."""
    values = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.metadata.get("text", True)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def format_pass(item: Any) -> str:
    """Pipeline text of one pass: its name and the options that differ from the defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(item)}
    chosen = {k: v for k, v in options_of(item).items() if _text(v) != _text(defaults.get(k))}
    inner = ",".join(f"{key}={_text(value)}" for key, value in chosen.items())
    return f"{item.name}{{{inner}}}" if inner else item.name


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(_text(item) for item in value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def parse(text: str) -> list[Pass]:
    """Passes from pipeline text, ``name{option=value,…},name…``; lists are written ``a+b``.

    Raises:
        LincompileError: unknown pass or option, or a value of the wrong type, with the position and the choices.
    """
    passes: list[Pass] = []
    position = 0
    pattern = re.compile(r"\s*([a-z][\w-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
    while position < len(text):
        match = pattern.match(text, position)
        if not match:
            raise LincompileError(f"pipeline text: can't read '{text[position:]}' (expected name{{option=value,…}})")
        passes.append(_build(match.group(1), match.group(2) or ""))
        position = match.end()
    if not passes:
        raise LincompileError("pipeline text is empty: write at least one pass, for example 'canonicalize'")
    return passes


def _build(name: str, options: str) -> Pass:
    load_builtin_passes()
    if name not in REGISTRY:
        raise LincompileError(f"unknown pass '{name}'; the passes are: {', '.join(sorted(REGISTRY))}")
    cls = REGISTRY[name]()
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("text", True)}
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in options.split(","))):
        key, separator, raw = part.partition("=")
        if not separator or key not in fields:
            raise LincompileError(
                f"pass '{name}' has no option '{key}'; its options are: {', '.join(fields) or 'none'}"
            )
        values[key] = _value(name, key, raw, fields[key].default)
    built: Pass = cls(**values)
    return built


def _value(name: str, key: str, raw: str, default: Any) -> Any:
    try:
        if raw == "none":
            return None
        if isinstance(default, bool):
            return {"true": True, "false": False}[raw]
        if isinstance(default, int) and re.fullmatch(r"-?\d+", raw):
            return int(raw)
        if isinstance(default, float):
            return float(raw)
        if isinstance(default, tuple):
            return tuple(int(item) if re.fullmatch(r"-?\d+", item) else item for item in raw.split("+"))
        return int(raw) if default is None and re.fullmatch(r"-?\d+", raw) else raw
    except (KeyError, ValueError):
        raise LincompileError(f"pass '{name}': option '{key}={raw}' isn't a {type(default).__name__}") from None


def load_builtin_passes() -> None:
    """Imports the modules that register the built-in passes (kept lazy: a pass may need more than torch)."""
    import importlib

    for module in BUILTIN:
        importlib.import_module(f".{module}", __package__)


BUILTIN: Iterable[str] = ("canonicalize", "identity", "linearize", "choose_heads", "quantize", "shard")
