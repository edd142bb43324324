"""States on disk: what a model has read so far, in a file that doesn't grow with the length of what was read.

A state file (safetensors) holds the states, the logits after the last token, and in its header which model they belong
to, how many tokens were read, a running hash of those tokens, and whether the prompt had been read to its end. An
interrupted prefill resumes from it; a finished one is a prompt cache. (Kept softmax sites carry a KV cache, which does
grow.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...passes.errors import ArtefactError, LincompileError
from ...passes.stateful import StateSpec
from ...passes.writing import beside
from ..generate import Prefilled

STATE_VERSION = 1
_KEY = "lincompile_state"
_LOGITS, _LENGTHS = "logits", "lengths"


def running_hash(tokens: Sequence[int], before: str = "") -> str:
    """Hash of a token sequence that can be continued: ``running_hash(b, running_hash(a)) == running_hash(a + b)``."""
    digest = before
    for token in tokens:
        digest = hashlib.sha256(f"{digest},{token}".encode()).hexdigest()
    return digest


@dataclass(frozen=True)
class SavedState:
    """What a state file holds.

    Attributes:
        state: states, logits ``[B, V]`` after the last token, and lengths ``[B]``.
        model: identity of the artefact it belongs to.
        runtime: ``torch`` or ``onnx``; their states differ in layout.
        hashes: :func:`running_hash` of the tokens read, per row.
        complete: False where the prompt was still being read.
    """

    state: Prefilled
    model: str
    runtime: str
    hashes: list[str]
    complete: bool = True

    def unread(self, prompt: Sequence[int], row: int = 0) -> tuple[list[int], bool]:
        """What of ``prompt`` the state hasn't read, and whether the prompt began with what it has.

        A prompt that begins with all the tokens read so far is that prompt again (its rest is left); any other is what
        comes next, which makes sense only after a complete one.

        Raises:
            LincompileError: the state is of an interrupted prefill, and this isn't its prompt.
        """
        read = int(self.state.lengths[row])
        if len(prompt) >= read and running_hash(prompt[:read]) == self.hashes[row]:
            return list(prompt[read:]), True
        if not self.complete:
            raise LincompileError(
                f"the state was saved {read} tokens into another prompt, which was interrupted: give that prompt again"
            )
        return list(prompt), False


def save_state(path: Path | str, saved: SavedState, specs: Sequence[StateSpec]) -> Path:
    """Writes a state file, whole or not at all.

    Args:
        specs: the session's ``states``, which name the tensors.

    Raises:
        LincompileError: the file can't be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {_LOGITS: saved.state.logits, _LENGTHS: saved.state.lengths}
    for spec, tensor in zip(specs, saved.state.states, strict=True):
        tensors[_tensor_name(spec)] = tensor
    header = {
        "version": STATE_VERSION,
        "model": saved.model,
        "runtime": saved.runtime,
        "hashes": saved.hashes,
        "complete": saved.complete,
    }
    check_destination(path)
    with beside(path, "the state file") as file:
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        header["content"] = _content(plain)
        save_file(plain, file, metadata={_KEY: json.dumps(header)})
    return path


def check_destination(path: Path) -> None:
    """Refuses to write a state file over anything else.

    Raises:
        LincompileError: the path exists, and :func:`save_state` didn't write it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            ours = _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        ours = False
    if not ours:
        raise LincompileError(f"{path} exists and is no state file: give another name")


def _content(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_state(
    path: Path | str,
    *,
    model: str,
    runtime: str,
    specs: Sequence[StateSpec],
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> SavedState:
    """Reads a state file and checks that it belongs here.

    Args:
        model: identity of the artefact that will continue it.
        runtime: the runtime that will.
        specs: that session's states.
        batch: number of sequences expected (None: any).
        device: where the states go (lengths and logits stay on the CPU).

    Raises:
        ArtefactError: no state file, a damaged one, or one of a newer version.
        LincompileError: it belongs to another model, runtime or batch size.
    """
    path = Path(path)
    tensors, header = _read(path)
    if header["model"] != model:
        raise LincompileError(
            f"{path} is the state of another model ({header['model'][:12]}…, this one is {model[:12]}…): "
            "states can't be carried over, read the prompt again"
        )
    if header["runtime"] != runtime:
        raise LincompileError(
            f"{path} was saved by the {header['runtime']} runtime, this is {runtime}: use --runtime {header['runtime']}"
        )
    missing = [spec.name for spec in specs if _tensor_name(spec) not in tensors]
    if missing or _LOGITS not in tensors or _LENGTHS not in tensors:
        raise ArtefactError(f"{path} is damaged: it lacks '{missing[0] if missing else _LOGITS}'; save it again")
    lengths = tensors[_LENGTHS]
    if batch is not None and lengths.shape[0] != batch:
        raise LincompileError(f"{path} holds {lengths.shape[0]} sequences, {batch} are wanted")
    states = [_checked(path, spec, tensors[_tensor_name(spec)], lengths.shape[0]).to(device) for spec in specs]
    if header.get("content") != _content(tensors):
        raise ArtefactError(f"{path} is damaged: its states don't match their hash; save it again")
    prefilled = Prefilled(tensors[_LOGITS], states, lengths, model)
    return SavedState(prefilled, model, runtime, list(header["hashes"]), bool(header["complete"]))


def _tensor_name(spec: StateSpec) -> str:
    return f"state.{spec.name}"


def _checked(path: Path, spec: StateSpec, tensor: Tensor, batch: int) -> Tensor:
    expected = (batch, *spec.shape)
    fits = tensor.dim() == len(expected) and all(
        size is None or size == actual for size, actual in zip(expected, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != spec.dtype:
        raise ArtefactError(f"{path} is damaged: '{spec.name}' is {tensor.dtype} {list(tensor.shape)}; save it again")
    return tensor


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ArtefactError(f"there is no state file {path}: save one with --save-state {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} can't be read ({error}): not a state file, or cut short") from error
    if _KEY not in metadata:
        raise ArtefactError(f"{path} isn't a state file: --save-state writes them")
    header: dict[str, Any] = json.loads(metadata[_KEY])
    if header["version"] > STATE_VERSION:
        raise ArtefactError(
            f"{path} has version {header['version']}, this lincompile reads {STATE_VERSION}: upgrade lincompile"
        )
    return tensors, header
