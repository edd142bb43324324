"""What every loader returns, and the checks that all of them share."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelLoadError

BATCH, SEQUENCE = 2, 11  # an example's shape; 11 is prime, so no model size is mistaken for the sequence


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for capture.

    ``module`` is in evaluation mode; where it is a wrapper, its ``prefix`` says what to strip from state names.
    ``example`` holds the keyword arguments of one call (batch 2). ``task`` is ``causal-lm``, ``encoder``, ``vision``
    or ``unknown``. ``format`` is what the source turned out to be. ``source_hash`` is the SHA-256 of the weight files
    in order (of the state, for a function or a module). ``tokenizer(folder)`` writes the tokenizer's files so that
    ``AutoTokenizer.from_pretrained(folder)`` works. ``max_positions`` is None when unbounded or unknown.
    ``exported`` is the program of a ``.pt2`` or converted TorchScript. ``notes`` are one-line remarks for the user.
    """

    module: nn.Module
    example: dict[str, Tensor]
    task: str
    format: str
    source: str
    source_hash: str
    config: dict[str, Any] | None = None
    tokenizer: Callable[[Path], None] | None = field(default=None, repr=False)
    max_positions: int | None = None
    exported: torch.export.ExportedProgram | None = field(default=None, repr=False)
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What the names of the captured state carry in front of the model's own names."""
        return str(getattr(self.module, "prefix", ""))


@dataclass(frozen=True)
class LoadOptions:
    """The options of ``load_model`` that every loader takes."""

    trust: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    meta: bool = False
    attn_implementation: str | None = None


def check_finite(module: nn.Module, prefix: str = "") -> None:
    """Raise ``ModelLoadError`` naming the first tensor that holds NaN or infinity.

    A buffer may hold infinities (masks do), never NaN. ``prefix`` is stripped from the reported name.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        is_buffer = not isinstance(tensor, nn.Parameter)
        values = tensor.detach()
        if bool(values.sum().isfinite()):  # one NaN or infinity makes the sum one too; many times faster than isfinite
            continue
        nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
        if nans or (infinities and not is_buffer):
            raise ModelLoadError(
                f"the weights hold {nans} NaN and {infinities} infinite values in '{name.removeprefix(prefix)}' "
                f"{list(values.shape)}: the checkpoint is damaged or diverged; load one without them"
            )


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of the files, one after the other (for one file: what sha256sum prints)."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def hash_state(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the module's state, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require(module: str, what: str, extras: str) -> ModuleType:
    """Import an optional package, or raise ``ModelLoadError`` naming the pip extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module:
            raise ModelLoadError(f"{what} needs the package '{module}', which fails to import: {error}") from error
        raise ModelLoadError(
            f"{what} needs the package '{module}', which isn't installed: pip install 'lincompile[{extras}]'"
        ) from error


def one_line(error: BaseException, limit: int = 240) -> str:
    """The first line of an exception's message, shortened, with its type where the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def some(names: Iterable[str], count: int = 4) -> str:
    """The first few names and how many there are in all."""
    listed: Sequence[str] = sorted(names)
    shown = ", ".join(listed[:count])
    return shown if len(listed) <= count else f"{shown}, … ({len(listed)} in all)"
