"""Saving an artefact from transformers: a copy, or a new one with the weights that training left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...passes.errors import ArtefactError, LincompileError
from ...passes.graph import set_tensor
from ...passes.program import share_tensors
from ...passes.writing import one_line
from ..artefact.files import MANIFEST, OTHER_RUNTIMES
from ..artefact.manifest import PROGRAM, WEIGHTS
from ..package import CONFIG, REPORT, Artefact, save

GENERATION_CONFIG = "generation_config.json"
NOTE = "saved by transformers with weights changed since compilation"
_WRITTEN = {MANIFEST, WEIGHTS, PROGRAM, REPORT, CONFIG}


def save_copy(artefact: Artefact, weights: Mapping[str, Tensor], target: Path) -> None:
    """Writes ``artefact`` with these weights (by the names the graph has for them) into a folder.

    Files there that don't belong to an artefact stay. The manifest, whose hashes cover the others, goes last.

    Raises:
        ArtefactError: the folder holds another model or programs for other runtimes, or can't be written.
        LincompileError: weights that are spread over processes.
    """
    if spread := sorted(name for name, tensor in weights.items() if hasattr(tensor, "full_tensor")):
        raise LincompileError(
            f"'{spread[0]}' is spread over processes: give save_pretrained a gathered state_dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )
    unchanged = artefact.holds(weights)
    if unchanged and target.resolve() == artefact.directory.resolve():
        return
    _check_target(target)
    with one_line(str(target), ArtefactError):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as scratch:
            made = Path(scratch) / "artefact"
            if unchanged:
                _copy(artefact, made)
            else:
                _save_changed(artefact, weights, made)
            for file in sorted(made.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
                os.replace(file, target / file.name)


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ArtefactError(f"{target} exists and isn't a folder: save to another one")
    held = {file.name for file in target.iterdir()} if target.is_dir() else set()
    if MANIFEST not in held and (other := sorted(held & _WRITTEN)):
        raise ArtefactError(f"{target} holds another model ('{other[0]}'): save to another folder")
    if MANIFEST in held and (other := sorted(held & set(OTHER_RUNTIMES))):
        raise ArtefactError(
            f"{target} holds an artefact with {other[0]}/, which would keep the old weights: remove it, or save to "
            "another folder"
        )


def _copy(artefact: Artefact, folder: Path) -> None:
    """The artefact's own files and its programs for other runtimes; not what else lies in its folder."""
    folder.mkdir()
    for name in (*artefact.manifest["files"], MANIFEST, REPORT):
        if (source := artefact.directory / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    for name in OTHER_RUNTIMES:
        if (artefact.directory / name).is_dir():
            shutil.copytree(artefact.directory / name, folder / name, dirs_exist_ok=True)


def _save_changed(artefact: Artefact, weights: Mapping[str, Tensor], folder: Path) -> None:
    """A new artefact of the same program, tokenizer and history."""
    step = replace(artefact.step, graph_module=share_tensors(artefact.step.graph_module, {}))
    parameters = set(artefact.manifest["parameter_names"])
    tied = artefact.manifest["tied"]
    put: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        first = tied.get(name, name)
        shared = first in weights and torch.equal(tensor, weights[first])  # gathered weights can be copies
        cpu = put.setdefault(first if shared else name, tensor.detach().cpu())
        set_tensor(step.graph_module, name, nn.Parameter(cpu, requires_grad=False) if name in parameters else cpu)
    manifest = {key: value for key, value in artefact.manifest.items() if key != "files"}
    manifest["notes"] = [note for note in manifest.get("notes", []) if note != NOTE] + [NOTE]
    kept = [name for name in artefact.manifest["files"] if name not in _WRITTEN and "/" not in name]

    def tokenizer(to: Path) -> None:
        for name in kept:
            shutil.copy(artefact.directory / name, to)

    save(
        step,
        folder,
        manifest=manifest,
        tokenizer=tokenizer,
        eos_ids=artefact.eos_ids,
        vocab_size=manifest["vocab_size"],
    )
