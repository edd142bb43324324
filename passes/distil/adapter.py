"""Adapters: the trained parts of a student in one small file, applied to a fresh conversion of the same teacher.

A safetensors file with the attention modules, the vectors (norms, biases) and the low-rank factors, in float16, and
in its metadata what it fits: the method, the sites, and hashes of the teacher's weights, of its source file, and of
all that the file itself holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LincompileError
from ..graph import get_attribute, parent_of
from ..linearization.methods import method_class
from ..linearize import MODULE_PREFIX
from ..program import AttentionSite, Program
from ..split_heads import heads_text
from ..writing import beside
from .instrument import add_stage
from .logits import own_parameters
from .lora import PREFIX, Addition, merge_lora

FORMAT = "lincompile-adapter-2"  # 1 didn't say whether q and k were read before or after their rotary embedding
ROTARY = {"kept": "keep", "removed": "remove"}
FLOOR = " floor "  # between what became of positions and a number; sites without it are of gates without a floor
CONTENTS = "contents"  # the hash of all that a file holds but itself; the first adapters of this format have none


def weights_hash(program: Program) -> str:
    """SHA-256 of the parameters' names and bytes."""
    return _hash(dict(program.graph_module.named_parameters()))


def _hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of names and bytes, and of a text after them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(text.encode())
    return digest.hexdigest()


def _contents(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    said = {name: text for name, text in metadata.items() if name != CONTENTS}
    return _hash(tensors, json.dumps(said, sort_keys=True))


def _sites(student: Program) -> dict[str, str]:
    """Site paths and methods, with the softmax window beside them, what became of positions, and the floor of the
    gates where they have one: ``lawcat+64 kept floor -1.0``.
    """
    return {site.path: _described(site) for site in student.sites}


def _described(site: AttentionSite) -> str:
    if site.method == "softmax":
        return site.method
    window = site.details.get("window")
    floor = f"{FLOOR}{float(site.details['lowest'])!r}" if "lowest" in site.details else ""
    return f"{site.method}{f'+{window}' if window else ''} {site.details['rotary']}{floor}"


def _switches(sites: Iterable[AttentionSite]) -> set[str]:
    """The options without which sites like these would stay softmax: their fields' names in ``Settings``."""
    kinds = {name for site in sites for name in (site.kind, site.bias)}
    return {option for kind, option in (("sliding", "rewrite_sliding"), ("alibi", "alibi")) if kind in kinds}


@dataclass(frozen=True)
class Settings:
    """The compiler's options that make the sites an adapter was trained for (None: the option isn't needed).

    ``lowest``: the floor of the sites' gates (None: they have none).
    """

    attn: str
    window: int | None
    rotary: str | None
    keep_softmax: str | None
    rewrite_sliding: bool = False
    alibi: bool = False
    lowest: float | None = None

    @staticmethod
    def of(sites: dict[str, str], switches: Collection[str] = ()) -> Settings:
        softmax = [method == "softmax" for method in sites.values()]
        heads = heads_text(list(sites), softmax)
        kept = [str(index) for index, stays in enumerate(softmax) if stays]
        keep = ",".join(kept) + ("," if len(kept) == 1 else "") if heads is None else heads
        described = [method.partition(FLOOR) for method in sites.values() if method != "softmax"]
        linear = [method.partition(" ") for method, _, _ in described]
        attn = linear[0][0].partition("+")[0] if linear else "softmax"
        windows = [int(method.partition("+")[2] or 0) for method, _, _ in linear]  # a sliding site's may be narrower
        rotary = next((ROTARY[how] for _, _, how in linear if how in ROTARY), None)  # some sites may have no positions
        return Settings(
            attn,
            max(windows, default=0) or None,
            rotary,
            keep or None,
            rewrite_sliding="rewrite_sliding" in switches,
            alibi="alibi" in switches,
            lowest=next((float(floor) for _, _, floor in described if floor), None),
        )

    def __str__(self) -> str:
        options = f"--attn {self.attn}"
        if self.window:
            options += f" --window {self.window}"
        if self.rotary and self.rotary != ("keep" if method_class(self.attn).rotary else "remove"):
            options += f" --rotary {self.rotary}"
        if self.keep_softmax:
            options += f" --keep-softmax {self.keep_softmax}"
        return options + (" --rewrite-sliding" if self.rewrite_sliding else "") + (" --alibi" if self.alibi else "")


@dataclass(frozen=True)
class _Header:
    """What an adapter's metadata says."""

    sites: dict[str, str]
    settings: Settings
    switches: list[str]
    teacher: str
    source: str
    record: dict[str, Any]
    metadata: Mapping[str, str]

    @staticmethod
    def of(metadata: Mapping[str, str]) -> _Header:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the metadata isn't an adapter's."""
        sites, record = json.loads(metadata["sites"]), json.loads(metadata["record"])
        switches = json.loads(metadata.get("switches", "[]"))  # the first adapters of this format have none
        if not (isinstance(sites, dict) and isinstance(record, dict) and isinstance(switches, list)):
            raise TypeError("sites and record are JSON objects, switches a JSON list")
        if all(method == "softmax" for method in sites.values()):
            raise ValueError("no site is linear")
        settings = Settings.of(sites, switches)
        return _Header(sites, settings, switches, metadata["teacher"], metadata["source"], record, metadata)


def save_adapter(
    path: Path,
    teacher: Program,
    student: Program,
    *,
    source_hash: str | None = None,
    record: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes what training changed: attention modules, vectors, and low-rank factors.

    Args:
        source_hash: SHA-256 of the file the teacher was loaded from.
        record: how it was trained (JSON-able).

    Raises:
        LincompileError: a matrix was trained whole (``--train full``), which no small file can hold, or a value
            doesn't fit ``dtype``, or the student isn't as training left it (its half-lives were changed, or it was
            quantized), or the file can't be written.
    """
    if (factor := student.metadata.get("half_lives", 1.0)) != 1:
        raise LincompileError(
            f"no adapter: the half-lives of this student were multiplied by {factor:g} after training, which "
            "--adapter would take for trained: save it without --half-lives, and give that beside --adapter"
        )
    if student.metadata.get("quantization"):
        raise LincompileError(
            "no adapter: the student is quantized, and its norms may have been fitted to rounded weights: save the "
            "adapter of a compilation without --quant"
        )
    additions: list[Addition] = student.metadata.get("low_rank", [])
    own = dict(teacher.graph_module.named_parameters(remove_duplicate=False))
    explained = {addition.name for addition in additions}
    tensors: dict[str, Tensor] = {}
    for name, parameter in student.graph_module.named_parameters():
        if name.startswith(MODULE_PREFIX) or (parameter.dim() == 1 and not torch.equal(parameter, own[name])):
            tensors[name] = parameter
        elif name not in explained and not torch.equal(parameter, own[name]):
            raise LincompileError(f"no adapter: '{name}' was trained whole; train with --train lora:R")
    for addition in additions:
        tensors[f"{PREFIX}/{addition.name}/up"] = addition.up
        tensors[f"{PREFIX}/{addition.name}/down"] = addition.down
    stored = {name: value.detach().cpu().to(dtype).contiguous() for name, value in tensors.items()}
    if bad := [name for name, value in stored.items() if not value.isfinite().all()]:
        raise LincompileError(f"no adapter: '{bad[0]}' doesn't fit {dtype}")
    metadata = {
        "format": FORMAT,
        "sites": json.dumps(_sites(student)),
        "switches": json.dumps(sorted(_switches(site for site in student.sites if site.method != "softmax"))),
        "teacher": weights_hash(teacher),
        "source": source_hash or "",
        "record": json.dumps(record or {}),
    }
    metadata[CONTENTS] = _contents(stored, metadata)
    with beside(path, "the adapter") as file:
        save_file(stored, file, metadata)


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Puts another training record into an adapter's file, which is replaced whole or not at all.

    Raises:
        LincompileError: the file is missing, damaged or no adapter, or can't be written.
    """
    tensors, header = _read(path)
    metadata = {**header.metadata, "record": json.dumps(record)}
    metadata[CONTENTS] = _contents(tensors, metadata)
    with beside(path, "the adapter") as replacement:
        save_file(tensors, replacement, metadata)


def apply_adapter(path: Path, teacher: Program, student: Program, *, source_hash: str | None = None) -> dict[str, Any]:
    """Applies an adapter to a freshly rewritten student, in place; returns its training record.

    The record is also kept in the student's ``metadata["adapter"]``, with the file's name, and in
    ``metadata["projections"]`` whether linear layers are still the ``"teacher's"`` or were ``"adapted"``.

    Raises:
        LincompileError: the file is missing, damaged or no adapter, was trained for another teacher (told by hash),
            or for other sites or another method.
    """
    tensors, header = _read(path)
    if weights_hash(teacher) != header.teacher and (not source_hash or source_hash != header.source):
        raise LincompileError(f"the adapter {path} was trained for another model: its teacher's hash differs")
    _check_sites(path, header, student)
    own_parameters(student, teacher)
    parameters = dict(student.graph_module.named_parameters(remove_duplicate=False))
    factors: dict[str, dict[str, Tensor]] = {}
    seen: set[str] = set()
    with torch.no_grad():
        for name, value in tensors.items():
            if name.startswith(PREFIX + "/"):
                target, _, part = name.removeprefix(PREFIX + "/").rpartition("/")
                factors.setdefault(target, {})[part] = value
                continue
            if name not in parameters or parameters[name].shape != value.shape:
                raise LincompileError(f"the adapter {path} holds '{name}', which this model hasn't")
            parameters[name].copy_(value)
            seen.add(name)
    if missing := [n for n in parameters if n.startswith(MODULE_PREFIX) and n not in seen]:
        raise LincompileError(f"the adapter {path} lacks '{missing[0]}'")
    additions = [_addition(path, student, name, pair) for name, pair in factors.items()]
    merge_lora(student, additions)
    student.metadata["low_rank"] = additions
    student.metadata["adapter"] = {"file": path.name, **header.record}
    student.metadata["projections"] = "adapted" if factors else "teacher's"
    add_stage(student, "adapter", _hash(tensors))
    return header.record


def check_adapter(path: Path, student: Program) -> None:
    """Whether an adapter is for a rewritten student's sites; whether for its weights, only ``apply_adapter`` can say.

    Raises:
        LincompileError: the file is missing, damaged or no adapter, or for other sites or another method.
    """
    with _opened(path) as (_, header):
        _check_sites(path, header, student)


def _check_sites(path: Path, header: _Header, student: Program) -> None:
    sites = header.sites
    if sites == _sites(student):
        return
    methods = sorted({site.partition(FLOOR)[0].removesuffix(" none") for site in sites.values()})
    linear = [site for site in student.sites if sites.get(site.path, "softmax") != "softmax"]
    wanted = Settings.of(sites, _switches(linear).union(header.switches))
    own = Settings.of(_sites(student))
    without = "".join(
        f" without --{name.replace('_', '-')}"
        for name in ("window", "keep_softmax")
        if getattr(own, name) and not getattr(wanted, name)
    )
    floor = "" if wanted.lowest == own.lowest else f" (in Python, lowest={wanted.lowest})"
    raise LincompileError(
        f"the adapter {path} is for {len(sites)} sites with {', '.join(methods)}: give {wanted}{without}{floor}"
    )


def settings_of(path: Path) -> Settings:
    """With which options to rewrite a teacher for an adapter.

    Raises:
        LincompileError: the file is missing, damaged or no adapter.
    """
    with _opened(path) as (_, header):
        return header.settings


def _read(path: Path) -> tuple[dict[str, Tensor], _Header]:
    with _opened(path) as (file, header):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    wanted = header.metadata.get(CONTENTS)
    if wanted is not None and wanted != _contents(tensors, header.metadata):
        raise LincompileError(f"the adapter {path} was damaged or edited: its contents' hash differs; copy it again")
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            what = f"is of {value.dtype}" if not value.is_floating_point() else "holds NaN or infinity"
            raise LincompileError(f"the adapter {path} is damaged: '{name}' {what}; copy or train it again")
    return tensors, header


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, _Header]]:
    """An adapter's file, whose tensors are read when they are asked for, and what its metadata says."""
    if not path.is_file():
        raise LincompileError(f"the adapter {path} doesn't exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                known = f"is an adapter of format {metadata['format']}" if "format" in metadata else "holds no adapter"
                raise LincompileError(f"{path} {known}; this version reads {FORMAT}")
            try:
                header = _Header.of(metadata)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise LincompileError(
                    f"the adapter {path} is damaged: its metadata can't be read ({type(error).__name__}: {error})"
                ) from error
            yield file, header
    except (SafetensorError, OSError) as error:
        raise LincompileError(f"the adapter {path} is damaged or isn't a safetensors file: {error}") from error


def _addition(path: Path, student: Program, name: str, pair: dict[str, Tensor]) -> Addition:
    parent, leaf = parent_of(student.graph_module, name) if _has(student, name) else (None, "")
    weight = getattr(parent, leaf, None)
    fits = isinstance(weight, Tensor) and pair.keys() == {"up", "down"}
    if not fits or weight.shape != (pair["up"].shape[0], pair["down"].shape[1]):  # type: ignore[union-attr]
        raise LincompileError(f"the adapter {path} holds factors for '{name}', which this model hasn't")
    device = weight.device  # type: ignore[union-attr]
    return Addition(name, nn.Parameter(pair["up"].float().to(device)), nn.Parameter(pair["down"].float().to(device)))


def _has(student: Program, name: str) -> bool:
    try:
        get_attribute(student.graph_module, name)
    except AttributeError:
        return False
    return True
