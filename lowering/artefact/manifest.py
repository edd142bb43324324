"""The manifest of an artefact folder, read back: what opening and running take for granted is checked here, once.

Files have hashes in the manifest. What the manifest itself says of the program, such as the windows of its attention
or which tensors are tied, decides its numbers as much as they do, and has a hash, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...passes.errors import ArtefactError
from ...passes.stateful import StateSpec
from .files import MANIFEST

FORMAT_VERSION = 1
WEIGHTS, PROGRAM = "model.safetensors", "program.pt2"
CHECKSUM = "checksum"
Kinds = type | tuple[type, ...]
NONE = type(None)
# By name, of the manifest, of one of its states and of one of its files.
FIELDS: dict[str, Kinds] = {
    "files": dict,
    "states": list,
    "windows": dict,
    "eos_ids": list,
    "parameter_names": list,
    "tied": dict,
    "max_positions": (int, NONE),
    "uniform_positions": bool,
    "causal": bool,
    "vocab_size": int,
}
STATE: dict[str, Kinds] = {"name": str, "site": str, "role": str, "shape": list, "dtype": str}
FILE: dict[str, Kinds] = {"bytes": int, "sha256": str}
DECIDING = tuple(name for name in FIELDS if name != "files")


def state_record(spec: StateSpec) -> dict[str, Any]:
    """A state as a manifest lists it."""
    return {
        "name": spec.name,
        "site": spec.site,
        "role": spec.role,
        "shape": list(spec.shape),
        "dtype": str(spec.dtype).removeprefix("torch."),
    }


def state_spec(record: Mapping[str, Any]) -> StateSpec:
    """The state that ``state_record`` wrote."""
    return StateSpec(
        name=record["name"],
        site=record["site"],
        role=record["role"],
        shape=tuple(record["shape"]),
        dtype=getattr(torch, record["dtype"]),
    )


def checksum(manifest: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of what in a manifest decides what the program gives (JSON-able values)."""
    deciding = {name: manifest[name] for name in DECIDING}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artefact folder, with everything in it that is read without asking.

    Raises:
        ArtefactError: not an artefact, of a newer format, or a damaged manifest.
    """
    file = directory / MANIFEST
    if not directory.is_dir():
        raise ArtefactError(f"{directory} isn't a folder: give the one that 'lincompile MODEL -o' wrote")
    if not file.is_file():
        raise ArtefactError(f"{directory} isn't a lincompile artefact: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{file} can't be read ({error}): compile the model again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ArtefactError(f"{file} has no format_version: it isn't a lincompile manifest")
    if version > FORMAT_VERSION:
        raise ArtefactError(
            f"{directory} has format version {version}, this lincompile reads {FORMAT_VERSION}: upgrade lincompile"
        )
    if wrong := _wrong(manifest):
        raise ArtefactError(f"{file} is damaged: '{wrong}' is missing or isn't what it should be; compile again")
    # Artefacts of before manifests had a checksum are read as they are.
    if CHECKSUM in manifest and manifest[CHECKSUM] != checksum(manifest):
        raise ArtefactError(
            f"{file} doesn't match its checksum: what it says of the program ({', '.join(DECIDING)}) is damaged or was "
            "changed; compile again"
        )
    return dict(manifest)


def _wrong(manifest: Mapping[str, Any]) -> str:
    """Name of a field that isn't what it should be ("" if all are)."""

    def first(values: Any, kinds: Mapping[str, Kinds], prefix: str) -> str:
        if not isinstance(values, dict):
            return prefix.rstrip(".")
        missing = (name for name, kind in kinds.items() if name not in values or not isinstance(values[name], kind))
        name = next(missing, None)
        return "" if name is None else prefix + name

    if wrong := first(manifest, FIELDS, ""):
        return wrong
    for index, record in enumerate(manifest["states"]):
        if wrong := first(record, STATE, f"states.{index}."):
            return wrong
        if not isinstance(getattr(torch, record["dtype"], None), torch.dtype):
            return f"states.{index}.dtype"
    for name in dict.fromkeys((WEIGHTS, PROGRAM, *manifest["files"])):
        if wrong := first(manifest["files"].get(name), FILE, f"files.{name}."):
            return wrong
    return ""
