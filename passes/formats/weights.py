"""Weight files of a Hugging Face folder: which ones count, and whether they are whole and safe to read."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from ..errors import ModelLoadError
from .loaded import one_line
from .sniff import sniff

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1])  # the order transformers prefers


def weight_files(folder: Path) -> list[Path]:
    """The weight files transformers will read, each checked for its format and for being whole.

    Raises:
        ModelLoadError: no weights, a missing shard, a cut-off or unsafe file.
    """
    name = next((n for n in _WEIGHTS if (folder / n).is_file()), None)
    if name is None:
        raise ModelLoadError(
            f"{folder}: config.json without weights (looked for {', '.join(_WEIGHTS)}); "
            "fetch the weights, or pass --plan to plan without them"
        )
    files = [folder / shard for shard in shards(folder / name)] if name in INDEXES else [folder / name]
    for file in files:
        if not file.is_file():
            raise ModelLoadError(f"{folder}: the shard {file.name} that {name} lists is missing; fetch it again")
        found = sniff(file)
        if found == "safetensors":
            _open_safetensors(file)
        elif found == "pickle":
            raise ModelLoadError(
                f"{file}: a pickle that wants to run code, where weights belong; "
                "get the model as safetensors, or from a source you trust"
            )
        elif found != "state_dict":
            raise ModelLoadError(
                f"{file}: a {found} file, where safetensors or torch weights belong; give it by itself"
            )
    return files


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name."""
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path}: a truncated or damaged safetensors file ({one_line(error)}); fetch it again"
        ) from error


def shards(index: Path) -> list[str]:
    """The files an index lists, in order of their names; none may lead out of the folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(
            f"{index}: not a readable index of weight shards ({one_line(error)}); fetch it again"
        ) from error
    for name in names:
        if Path(name).name != name:
            raise ModelLoadError(f"{index}: lists '{name}', which isn't in its own folder; fetch it again")
    return names


def _open_safetensors(path: Path) -> None:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path}: a truncated or damaged safetensors file ({one_line(error)}); fetch it again"
        ) from error
