"""The artefact folder: written whole or not at all, checked against its own hashes when it is opened.

lincompile.json     manifest: format version, source hash, passes and options, sites, quantization, metrics …
model.safetensors   every tensor of the program once (tied ones are listed in the manifest)
program.pt2         the step graph, without weights
tokenizer files     as ``AutoTokenizer.from_pretrained`` wants them, where the model has a tokenizer
config.json         for transformers' auto classes (after ``import lincompile.hf``), where the model generates
report.html         the manifest for people
onnx/               where the target asked for it
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..passes.errors import ArtefactError, LincompileError
from ..passes.stateful import StateSpec, StepProgram
from ..passes.writing import one_line
from .artefact.files import MANIFEST, OTHER_RUNTIMES, records, replace_text, sha256
from .artefact.graph_file import read_graph, weights_of, write_graph
from .artefact.manifest import (
    CHECKSUM,
    FORMAT_VERSION,
    PROGRAM,
    WEIGHTS,
    checksum,
    read_manifest,
    state_record,
    state_spec,
)
from .artefact.report import render_report
from .artefact.state_file import SavedState, load_state, running_hash, save_state
from .generate import Generation, Prefilled, Session, generate
from .tokenizer import TextCodec
from .triton import lower

REPORT, CONFIG = "report.html", "config.json"
REPORTED_PACKAGES = ("lincompile", "torch", "triton", "onnx", "onnxruntime", "transformers", "safetensors", "numpy")


def check_output(directory: Path) -> None:
    """Refuses an output folder that :func:`save` could not write, before hours of work go into what it would hold.

    Raises:
        ArtefactError: the path is a file, a folder that holds something else, is a mount point or holds the current
            folder (a finished artefact is renamed into place, and these can't be), or can't be written.
    """
    directory = Path(directory)
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ArtefactError(f"the output {directory} exists and isn't a folder: choose another one with -o")
    if os.path.ismount(directory):
        raise ArtefactError(f"the output {directory} is a mount point, which can't be replaced: choose a folder in it")
    if Path.cwd().is_relative_to(directory.resolve()):
        raise ArtefactError(
            f"the output {directory} is the current folder or one that holds it, which can't be replaced: "
            "choose a new folder with -o"
        )
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        other = sorted(item.name for item in directory.iterdir())[0]
        raise ArtefactError(
            f"the output folder {directory} holds something else ('{other}'): choose an empty or a new one with -o"
        )
    with _staging(directory):
        pass


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A temporary folder beside ``directory``; gone afterwards unless it was renamed, whatever happens inside."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise ArtefactError(f"the output {directory} can't be written ({error.strerror}): choose another") from error
    try:
        folder.chmod(0o755)  # mkdtemp's 0o700 would stay on the finished artefact
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(
    step: StepProgram,
    directory: Path | str,
    *,
    manifest: Mapping[str, Any],
    tokenizer: Callable[[Path], None] | None = None,
    eos_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Writes an artefact folder, atomically.

    Args:
        step: the step program, with its weights.
        directory: a new or empty folder, or an earlier artefact, which is replaced.
        manifest: what the compiler knows: ``source``, ``options``, ``passes``, ``sites``, ``quantization``,
            ``metrics``, ``seed`` … (JSON-able). Files, hashes, states and versions are added here.
        tokenizer: called with a folder, writes the tokenizer's files into it.
        eos_ids: tokens at which generation stops.
        vocab_size: number of token ids; read off the graph when not given.
        extra: called with the temporary folder before it is renamed, to add files (``onnx/``).

    Raises:
        ArtefactError: the folder holds something else or can't be written.
        LincompileError: the graph can't be saved.
    """
    directory = Path(directory)
    check_output(directory)
    graph_module, states = step.graph_module, step.states
    if vocab_size is None:
        vocab_size = Session(step).vocab_size
    with _staging(directory) as folder, one_line(f"the output {directory}", ArtefactError):
        tied = _write_weights(graph_module, folder / WEIGHTS)
        write_graph(graph_module, states, folder / PROGRAM)
        if tokenizer is not None:
            tokenizer(folder)
        if extra:
            extra(folder)
        document = {
            "format_version": FORMAT_VERSION,
            **manifest,
            "states": [state_record(spec) for spec in states],
            "windows": step.windows,
            "max_positions": step.max_positions,
            "uniform_positions": step.uniform_positions,
            "causal": step.causal,
            "vocab_size": vocab_size,
            "eos_ids": list(eos_ids),
            "parameter_names": [name for name, _ in graph_module.named_parameters(remove_duplicate=False)],
            "tied": tied,
            "versions": {**versions(), **manifest.get("versions", {})},
        }
        if states:
            (folder / CONFIG).write_text(json.dumps(hf_config(document), indent=2) + "\n", encoding="utf-8")
        document["files"] = records(folder)
        document = jsonable(document)
        document[CHECKSUM] = checksum(document)
        (folder / REPORT).write_text(render_report(document), encoding="utf-8")
        (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _put_in_place(folder, directory)
    return directory


def hf_config(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers asks of a model's ``config.json``."""
    eos = list(manifest["eos_ids"])
    return {
        "model_type": "lincompile",
        "architectures": ["LincompileForCausalLM"],
        "vocab_size": manifest["vocab_size"],
        "max_position_embeddings": manifest["max_positions"],
        "eos_token_id": eos or None,
    }


def add_metrics(directory: Path | str, metrics: Mapping[str, Any]) -> None:
    """Adds figures measured on a finished artefact to its manifest and report; what runs is not touched."""
    directory = Path(directory)
    document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    document["metrics"] = {**document.get("metrics", {}), **jsonable(metrics)}
    replace_text(directory / REPORT, render_report(document))
    replace_text(directory / MANIFEST, json.dumps(document, indent=2) + "\n")


def _put_in_place(folder: Path, directory: Path) -> None:
    """Renames the finished folder; an earlier artefact steps aside first and comes back if the rename fails."""
    if not directory.exists():
        folder.rename(directory)
        return
    aside = folder.with_suffix(".old")
    directory.rename(aside)
    try:
        folder.rename(directory)
    except BaseException:
        aside.rename(directory)
        raise
    shutil.rmtree(aside)


def _write_weights(graph_module: GraphModule, path: Path) -> dict[str, str]:
    """Writes each tensor once; returns {name of a tied tensor: name under which it is stored}."""
    from safetensors.torch import save_file

    stored: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    unique: dict[str, Tensor] = {}
    for name, tensor in sorted(weights_of(graph_module).items()):
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in stored:
            tied[name] = stored[key]
            continue
        stored[key] = name
        # A copy where several tensors are views of one storage: safetensors stores values, not views.
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        unique[name] = tensor.cpu().contiguous() if whole else tensor.cpu().contiguous().clone()
    save_file(unique, path, metadata={"format": "pt"})
    path.chmod(0o644)  # as every other file of the folder
    return tied


def jsonable(value: Any) -> Any:
    """``value`` as JSON has it: tuples become lists, NaN and infinities (which JSON lacks) and objects text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def versions() -> dict[str, str]:
    """Versions of the packages that shape an artefact (those that are installed)."""
    found = {}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass
class Artefact:
    """An opened artefact folder. The program and the tokenizer are loaded when they are first needed."""

    directory: Path
    manifest: dict[str, Any]
    device: torch.device

    @property
    def states(self) -> list[StateSpec]:
        """The states that the program carries from step to step."""
        return [state_spec(record) for record in self.manifest["states"]]

    @property
    def eos_ids(self) -> list[int]:
        """Tokens at which generation stops."""
        return list(self.manifest["eos_ids"])

    @property
    def identity(self) -> str:
        """What tells this model from others: a hash of its weights' and its program's hashes."""
        hashes = [self.manifest["files"][name]["sha256"] for name in (WEIGHTS, PROGRAM)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def save_state(
        self, path: Path | str, state: Prefilled, prompts: Sequence[Sequence[int]] = (), *, complete: bool = True
    ) -> Path:
        """Writes the states of sequences being read or continued to a file (see :mod:`.state_file`).

        Args:
            state: ``Generation.state``, or what ``prefill`` returned.
            prompts: the tokens read per row; with them :meth:`load_state` can tell whether a prompt begins with what
                the state has read.
            complete: False where a prompt is still being read.

        Raises:
            LincompileError: the file can't be written.
        """
        self._check_owner(state)
        hashes = [running_hash(row) for row in prompts] or [""] * state.lengths.shape[0]
        return save_state(path, SavedState(state, self.identity, "torch", hashes, complete), self.states)

    def load_state(self, path: Path | str, *, batch: int | None = None) -> SavedState:
        """Reads a state file of this artefact; its ``.state`` goes into ``continue_ids(…, after=…)``.

        Raises:
            LincompileError: no state file, a damaged one, or one of another model, runtime or batch size.
        """
        return load_state(
            path, model=self.identity, runtime="torch", specs=self.states, batch=batch, device=self.device
        )

    @cached_property
    def session(self) -> Session:
        """The torch runtime of the program; on a GPU with its stages fused (see ``lowering/triton.py``)."""
        step = lower(self.step, decoding=True, own=True)[0] if self.device.type == "cuda" else self.step
        return Session(step, vocab_size=self.manifest["vocab_size"], plain=self.step)

    @cached_property
    def step(self) -> StepProgram:
        """The step program with its weights."""
        return self.around(self._graph_module())

    def around(self, graph_module: GraphModule) -> StepProgram:
        """A step program with this artefact's states and limits around a graph module, or what is called like one."""
        known = self.manifest
        return StepProgram(
            graph_module,
            self.states,
            windows=known["windows"],
            max_positions=known["max_positions"],
            uniform_positions=known["uniform_positions"],
            causal=known["causal"],
        )

    def _graph_module(self) -> GraphModule:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.directory / WEIGHTS
        try:
            weights = load_file(path, device=str(self.device))
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path} can't be read: {error}") from error
        for name, original in self.manifest["tied"].items():
            weights[name] = weights[original]
        return read_graph(self.directory / PROGRAM, weights, set(self.manifest["parameter_names"]))

    def holds(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether the weights file holds exactly these tensors (by the names the graph has for them)."""
        from safetensors import safe_open

        tied = self.manifest["tied"]
        with safe_open(self.directory / WEIGHTS, framework="pt") as file:
            return all(torch.equal(file.get_tensor(tied.get(name, name)), t.cpu()) for name, t in weights.items())

    @cached_property
    def tokenizer(self) -> TextCodec:
        """The tokenizer; a LincompileError where the artefact has none."""
        return TextCodec(self.directory)

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be given and read (token ids always can)."""
        return (self.directory / "tokenizer.json").is_file()

    def generate(self, prompt: str | Sequence[int], max_new_tokens: int = 64, **options: Any) -> str | list[int]:
        """The prompt and its continuation: text for text, token ids for token ids. Options as in ``generate``."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            return self.tokenizer.decode(ids + self.continue_ids([ids], max_new_tokens, **options).tokens[0])
        return [*prompt, *self.continue_ids([list(prompt)], max_new_tokens, **options).tokens[0]]

    def continue_ids(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, **options: Any) -> Generation:
        """:func:`lincompile.lowering.generate.generate` on this artefact's session, stopping at its EOS tokens."""
        if (after := options.get("after")) is not None:
            self._check_owner(after)
        result = generate(self.session, prompts, max_new_tokens, **{"eos_ids": self.eos_ids, **options})
        return replace(result, state=replace(result.state, model=self.identity))

    def _check_owner(self, state: Prefilled) -> None:
        if state.model not in ("", self.identity):
            raise LincompileError(
                f"the state is of another model ({state.model[:12]}…, {self.directory} is {self.identity[:12]}…): "
                "read the text again"
            )


def open_artefact(directory: Path | str, *, device: str | torch.device = "cpu", verify: bool = True) -> Artefact:
    """Opens an artefact folder.

    Args:
        directory: what :func:`save` wrote.
        device: where the weights go.
        verify: compare each file with its hash in the manifest (a read of the whole folder).

    Raises:
        ArtefactError: not an artefact, of a newer format, a missing file, or a file that doesn't match its hash.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, record in manifest["files"].items():
        runtime = name.partition("/")[0]
        if runtime not in OTHER_RUNTIMES or (directory / runtime).exists():
            _check_file(directory / name, record, verify)
    return Artefact(directory, manifest, torch.device(device))


def _check_file(path: Path, record: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise ArtefactError(f"{path} is missing: the artefact is incomplete, copy or compile it again")
    if path.stat().st_size != record["bytes"] or (verify and sha256(path) != record["sha256"]):
        raise ArtefactError(f"{path} doesn't match its hash in {MANIFEST}: damaged, or changed after it was saved")


def bytes_on_disk(directory: Path) -> int:
    """Bytes of what runs: weights and program (report, manifest and tokenizer left out)."""
    return sum(os.path.getsize(Path(directory) / name) for name in (WEIGHTS, PROGRAM))
