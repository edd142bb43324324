"""Running an exported model with onnxruntime, behind the interface of the torch step program."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...passes.errors import ArtefactError, LincompileError
from ...passes.stateful import StateSpec, trimmed, visible_tokens
from .export import MODEL_FILE
from .extra import require
from .metadata import LOGITS_FROM

_GROWING_ROLES = ("key", "value")
_MINIMUM_RUNTIME = (1, 32)
_LONG_CHUNK = 64  # tokens of a batch that are worth handing freed memory back for


class OnnxSession:
    """An exported model: ``session(tokens, positions, mask, states) -> (logits, states)``.

    The same call serves prefill, in chunks of any length, and decode.

    Attributes:
        states: a ``StateSpec`` for each tensor that a caller carries from call to call, starting from
            :meth:`initial_states`; where softmax sites are kept the first is the past attention mask.
        vocab_size: number of token ids (the size of an encoder's output).
        causal: False for an encoder: no states, each call is a whole sequence.
        max_positions: longest sequence the model accepts, None if unbounded.
        uniform_positions: all rows of a batch must be at the same position.
        native: the native library's kernels that run (``avx512vnni``); None where all kernels are onnxruntime's.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None):
        """Open ``folder`` (or the ``.onnx`` file itself) on the CPU.

        Args:
            threads: threads inside one operator; None leaves the choice to onnxruntime.

        Raises:
            ArtefactError: no model there, a truncated or foreign file, missing external data, or a runtime too old.
            LincompileError: onnxruntime isn't installed.
        """
        require("onnxruntime")
        import onnxruntime

        from ..native import library
        from .metadata import Signature

        path = Path(folder)
        path = path / MODEL_FILE if path.is_dir() else path
        if not path.is_file():
            raise ArtefactError(f"no ONNX model at {path}; write one with lincompile export")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it would print as errors is raised, in one line
        # The arena would keep what the longest chunk needed, as long as the session lives.
        options.enable_cpu_mem_arena = False
        if threads is not None:
            options.intra_op_num_threads = threads
        self.native = library.register(options) if library.calls_native_operators(path) else None
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ArtefactError(f"onnxruntime can't load {path}: {_advice(error, onnxruntime.__version__)}") from error
        _return_freed_memory()
        self.path = path
        try:
            signature = Signature.read(dict(self._session.get_modelmeta().custom_metadata_map))
        except LincompileError as error:
            raise ArtefactError(f"{path} can't be run as a step program: {error}") from None
        self._bound = signature.states
        self.vocab_size = signature.vocabulary
        self.causal = signature.causal
        self.max_positions = signature.max_positions
        self.uniform_positions = signature.uniform_positions
        self._grows = any(state.role in _GROWING_ROLES for state in self._bound)
        self._outputs = ["logits", *(state.present for state in self._bound)]
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._chooses_logits = LOGITS_FROM in {item.name for item in self._session.get_overridable_initializers()}
        self.states: list[StateSpec] = [
            StateSpec(name=state.past, site=state.site, role=state.role, shape=state.shape, dtype=torch.float32)
            for state in self._bound
        ]
        if self._grows:
            mask = StateSpec(name="attention_mask", site="", role="mask", shape=(None,), dtype=torch.bool)
            self.states.insert(0, mask)
        self._limits = [visible_tokens(spec, self.states, signature.windows) for spec in self.states]

    def initial_states(self, batch: int) -> list[Tensor]:
        """Zeros, of length 0 on growing axes."""
        return [
            torch.zeros(batch, *(0 if size is None else size for size in state.shape), dtype=state.dtype)
            for state in self.states
        ]

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One chunk of ``t ≥ 1`` tokens of ``B ≥ 1`` sequences.

        Args:
            tokens: int64 ``[B, t]``.
            positions: int64 ``[B, t]``.
            mask: bool ``[B, t]``, True = real token.
            states: as returned by the previous call, or :meth:`initial_states`.

        Returns:
            logits float32 ``[B, t, V]`` and the new states.

        Raises:
            LincompileError: shapes that don't belong together, naming the input or state; token ids or positions below
                0 or past the model's tables. How long a sequence may be is ``generate``'s to ask.
        """
        return self._run(tokens, positions, mask, states, {})

    def step_last(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same call, but logits of the chunk's last token may be all there are: ``[B, 1 or t, V]``."""
        extra = {LOGITS_FROM: np.array([-1])} if self._chooses_logits else {}
        return self._run(tokens, positions, mask, states, extra)

    def _run(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: Sequence[Tensor], extra: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        states = list(states)
        self._check(tokens, positions, mask, states)
        mask = mask.bool()
        past_mask = states.pop(0) if self._grows else None
        seen = mask if past_mask is None else torch.cat([past_mask, mask], dim=1)
        feed: dict[str, Any] = {
            "input_ids": tokens.contiguous().numpy(),
            "position_ids": positions.contiguous().numpy(),
            "attention_mask": seen.long().numpy(),
        }
        for bound, state in zip(self._bound, states, strict=True):
            feed[bound.past] = state.detach().contiguous().numpy()
        feed = {name: value for name, value in feed.items() if name in self._inputs} | extra
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise LincompileError(f"onnxruntime can't run this call: {_reason(error)}") from error
        logits, *present = (torch.from_numpy(value) for value in results)
        if tokens.numel() >= _LONG_CHUNK:
            _return_freed_memory()
        new = zip(self.states, self._limits, ([seen] if self._grows else []) + present, strict=True)
        return logits, [trimmed(spec.role, limit, state) for spec, limit, state in new]

    step = __call__  # the name the generation loop uses

    def _check(self, tokens: Tensor, positions: Tensor, mask: Tensor, states: Sequence[Tensor]) -> None:
        for name, value in (("tokens", tokens), ("positions", positions)):
            if value.dtype != torch.int64:
                raise LincompileError(f"{name} must be int64, got {str(value.dtype).removeprefix('torch.')}")
        if tokens.dim() != 2 or min(tokens.shape) < 1:  # some of onnxruntime's kernels divide by the batch
            raise LincompileError(f"tokens must be [batch ≥ 1, time ≥ 1], got {list(tokens.shape)}")
        for name, value in (("positions", positions), ("mask", mask)):
            if value.shape != tokens.shape:
                raise LincompileError(
                    f"{name} must have the tokens' shape {list(tokens.shape)}, got {list(value.shape)}"
                )
        for name, value in (("tokens", tokens), ("positions", positions)):
            if value.numel() and int(value.min()) < 0:  # ONNX counts such an index from the end of its table
                raise LincompileError(f"{name} must be 0 or more, got {int(value.min())}")
        if len(states) != len(self.states):
            raise LincompileError(
                f"the model carries {len(self.states)} states, got {len(states)}; start from initial_states()"
            )
        for spec, state in zip(self.states, states, strict=True):
            expected = [tokens.shape[0], *spec.shape]
            fits = state.dim() == len(expected) and all(
                size is None or size == actual for size, actual in zip(expected, state.shape, strict=True)
            )
            if not fits or state.dtype != spec.dtype:
                shape = ", ".join("any" if size is None else str(size) for size in expected)
                raise LincompileError(
                    f"state '{spec.name}' must be {str(spec.dtype).removeprefix('torch.')} [{shape}], "
                    f"got {str(state.dtype).removeprefix('torch.')} {list(state.shape)}"
                )


def _return_freed_memory() -> None:
    """Hand back what glibc holds on to: a file's bytes and constants before folding, what a long chunk needed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such function
    if trim is not None:
        trim(0)


def _advice(error: Exception, version: str) -> str:
    text = str(error)
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if parts < _MINIMUM_RUNTIME:
        needed = ".".join(map(str, _MINIMUM_RUNTIME))
        return (
            f"onnxruntime {version} is older than {needed}, whose operators the file uses: pip install -U onnxruntime"
        )
    if "external" in text.lower() or "model.onnx.data" in text:
        return "its weights are missing or cut short: the whole model.onnx.data must lie beside it; or export it again"
    if "protobuf" in text.lower() or "INVALID_PROTOBUF" in text:
        return "the file is truncated or not an ONNX model; export it again"
    return _reason(error)


def _reason(error: Exception) -> str:
    """Onnxruntime's message in one line, from what went wrong on: the code and the function come before it."""
    text = " ".join(str(error).split())
    return text.rpartition("Status Message: ")[2][:300]
