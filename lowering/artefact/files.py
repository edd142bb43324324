"""The files of an artefact folder as its manifest lists them, by path: ``{"bytes": int, "sha256": hexadecimal}``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "lincompile.json"
OTHER_RUNTIMES = ("aot", "onnx")  # folders that an artefact is complete without
_SETTINGS = "genai_config.json"  # beside an ONNX model, for its user to change: has no hash


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file below ``folder``, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _SETTINGS)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
    }


def forget_files(directory: Path, folder: Path) -> None:
    """Take the files of an artefact's ``folder``, such as ``onnx/``, out of its manifest before they are written anew.

    An export that is killed then leaves an artefact that opens. Nothing happens where the folder isn't inside the
    artefact's.
    """
    _put(directory, folder, {})


def record_files(directory: Path, folder: Path) -> None:
    """Put the files of an artefact's ``folder`` into its manifest, in place of what it said of them."""
    _put(directory, folder, records(folder))


def _put(directory: Path, folder: Path, new: Mapping[str, Any]) -> None:
    root, inside = directory.resolve(), folder.resolve()
    if root not in inside.parents:
        return
    prefix = inside.relative_to(root).as_posix() + "/"
    document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    files = {name: record for name, record in document["files"].items() if not name.startswith(prefix)}
    files |= {prefix + name: record for name, record in new.items()}
    if files != document["files"]:
        replace_text(directory / MANIFEST, json.dumps({**document, "files": files}, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is never there in part."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
