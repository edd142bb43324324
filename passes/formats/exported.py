"""Programs that torch wrote: ``.pt2`` (torch.export) and TorchScript, which is converted and checked."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import ModelLoadError
from .loaded import LoadedModel, LoadOptions, check_finite, hash_files, one_line
from .plain import Example, infer_example

_TABLES = ("_weights_config.json", "_constants_config.json")
_PLAIN_MEMBERS = {"models", "extra", ".data", "archive_format", "archive_version", "byteorder", ".format_version"}


class ExportedModule(nn.Module):
    """An exported program as a module that takes its inputs by name, however they were passed when it was exported."""

    prefix = "program."

    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__()
        self.program = exported.module(check_guards=False)
        self.names = tuple(str(name) for name in exported.graph_signature.user_inputs)
        self.spec = exported.call_spec.in_spec
        self.training = False

    def train(self, mode: bool = True) -> ExportedModule:
        """An exported graph has one mode only, the one it was traced in."""
        return self

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Call the program with its inputs by position or by name."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        given, named = torch.utils._pytree.tree_unflatten([values[name] for name in self.names], self.spec)
        return self.program(*given, **named)


def load_pt2(path: Path, options: LoadOptions, example: Example | None = None) -> LoadedModel:
    """Load an exported program. Its dtypes stay as exported: they are part of the graph.

    torch.export.load unpickles some members without restriction, so each of them must first pass as plain data.

    Raises:
        ModelLoadError: a damaged archive, one that is compiled code, or one with pickles that want more than data.
    """
    data = path.read_bytes()
    if not options.trust:
        _check_members(path, data)
    try:
        with _silent():
            exported: ExportedProgram = torch.export.load(io.BytesIO(data))
    except Exception as error:  # the loader's own asserts and lookups, on a file that isn't what it should be
        raise ModelLoadError(
            f"{path}: torch {torch.__version__} can't load this exported program ({type(error).__name__}: "
            f"{one_line(error)}); export it again with this version's torch.export.save"
        ) from error
    notes = []
    dtypes = {p.dtype for p in exported.parameters() if p.is_floating_point()}
    if dtypes - {options.dtype}:
        kept = ", ".join(sorted(map(str, dtypes)))
        notes.append(f"the exported program keeps its dtype ({kept})")
    return _from_program(exported, path, "pt2", options, example, tuple(notes))


def load_torchscript(path: Path, options: LoadOptions, example: Example | None = None) -> LoadedModel:
    """Convert a TorchScript file to an exported program, and check it against the original at another shape.

    Raises:
        ModelLoadError: a damaged file, or a program that the converter can't translate faithfully.
    """
    way_out = "export the original module with torch.export.save, or give its state dict with --model module:function"
    try:
        with _silent():
            script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelLoadError(f"{path}: a damaged or too old TorchScript file ({one_line(error)}); {way_out}") from error
    inputs = _script_inputs(script, path, example)
    try:
        with _silent():
            from torch._export.converter import TS2EPConverter

            exported = TS2EPConverter(script, tuple(inputs.values())).convert()
            _mark_parameters(exported, script)
            _check_conversion(script, exported, inputs)
    except Exception as error:  # the converter is experimental: anything it raises means the same to the user
        raise ModelLoadError(
            f"{path}: this TorchScript program can't be converted "
            f"({type(error).__name__}: {one_line(error)}); {way_out}"
        ) from error
    values = tuple(inputs.values())  # by position: the converter may have renamed them
    return _from_program(exported, path, "torchscript", options, values, ("converted from TorchScript",))


def _script_inputs(script: Any, path: Path, example: Example | None) -> dict[str, Tensor]:
    """The script's inputs by the names in its schema; inspect can't read the signature of a script."""
    arguments = script.forward.schema.arguments[1:]
    if example is None:
        try:
            return infer_example(script, [a.name for a in arguments if not a.has_default_value()])
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from error
    if isinstance(example, Mapping):
        return dict(example)
    values = [example] if isinstance(example, Tensor) else list(example)
    return dict(zip([a.name for a in arguments], values, strict=False))


def _from_program(
    exported: ExportedProgram,
    path: Path,
    source_format: str,
    options: LoadOptions,
    example: Example | None,
    notes: tuple[str, ...],
) -> LoadedModel:
    _tie(exported)
    if torch.device(options.device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, options.device)
    module = ExportedModule(exported)
    check_finite(module, module.prefix)
    if example is None:
        inputs = _stored_example(exported, path)
    elif isinstance(example, Mapping):
        inputs = dict(example)
    else:
        inputs = dict(zip(module.names, [example] if isinstance(example, Tensor) else example, strict=False))
    if set(inputs) != set(module.names):
        raise ModelLoadError(
            f"{path}: the program takes {', '.join(module.names)}, the example has {', '.join(inputs) or 'nothing'}"
        )
    return LoadedModel(
        module=module,
        example={k: v.to(options.device) for k, v in inputs.items()},
        task="unknown",
        format=source_format,
        source=str(path),
        source_hash=hash_files([path]),
        exported=exported,
        notes=notes,
    )


def _mark_parameters(exported: ExportedProgram, script: Any) -> None:
    """Make parameters of the script parameters of the program: the converter takes all of them for buffers."""
    parameters = {name for name, _ in script.named_parameters(remove_duplicate=False)}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.target in parameters:
            spec.kind, spec.persistent = InputKind.PARAMETER, None
            exported.state_dict[spec.target] = nn.Parameter(exported.state_dict[spec.target].detach())


def _tie(exported: ExportedProgram) -> None:
    """Give names that share memory one parameter again: a saved program keeps the sharing, not the identity."""
    seen: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in exported.state_dict.items():
        if isinstance(tensor, nn.Parameter) and tensor.numel():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            exported.state_dict[name] = seen.setdefault(key, tensor)


def _stored_example(exported: ExportedProgram, path: Path) -> dict[str, Tensor]:
    """The inputs the program was exported with, by name; sizes it left open are as they were then."""
    names = [str(name) for name in exported.graph_signature.user_inputs]
    stored = exported.example_inputs
    values = torch.utils._pytree.tree_leaves(stored) if stored is not None else []
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        raise ModelLoadError(
            f"{path}: the program was saved without tensors as its example inputs; pass example= in Python, "
            "or export it again with tensors as its only inputs"
        )
    return dict(zip(names, values, strict=True))


def _check_conversion(script: Any, exported: ExportedProgram, inputs: dict[str, Tensor]) -> None:
    """The converted program equals the script on the example and on larger inputs, so no size was baked in."""
    module = exported.module(check_guards=False)
    larger = {k: torch.cat([v, v[:1]]) for k, v in inputs.items()}
    shorter = {k: v[:, :-1] if v.dim() == 2 else v for k, v in larger.items()}
    for given in (inputs, larger, shorter):
        with torch.no_grad():
            expected, found = script(*given.values()), module(*given.values())
        for a, b in zip(_tensors(expected), _tensors(found), strict=True):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise ValueError("the converted program computes something else")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _check_members(path: Path, data: bytes) -> None:
    """Refuse an archive with a member that torch.export.load would unpickle and that isn't plain data.

    Members are read with the reader that torch.export.load uses, so both see the same bytes.
    """
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        members = reader.get_all_records()
    except RuntimeError as error:
        raise ModelLoadError(
            f"{path}: a truncated or damaged .pt2 archive ({one_line(error)}); save it again"
        ) from error
    if any(name.startswith("data/aotinductor/") for name in members) and not any(
        name.startswith("models/") for name in members
    ):
        raise ModelLoadError(f"{path}: compiled by AOTInductor, the graph is gone; give what torch.export.save wrote")
    raw, pickled = _payloads(path, reader, members)
    for name in members:
        if not name.startswith("data/"):
            if name.split("/")[0] not in _PLAIN_MEMBERS:
                raise ModelLoadError(f"{path}: holds '{name}', no part of a plain exported program; export it again")
            continue
        if name not in pickled and (name in raw or name.endswith(_TABLES)):
            continue
        try:
            with _silent():
                torch.load(io.BytesIO(reader.get_record(name)), weights_only=True)
        except Exception as error:  # whatever it is, it isn't plain data
            raise ModelLoadError(
                f"{path}: not loaded, because its member '{name}' is a pickle that wants more than tensors; "
                "export the model with plain tensors, or pass --trust if you trust whoever made the file"
            ) from error


def _payloads(path: Path, reader: Any, members: list[str]) -> tuple[set[str], set[str]]:
    """Members that the archive's tables declare to be raw bytes of tensors, and those they declare to be pickled."""
    raw: set[str] = set()
    pickled: set[str] = set()
    for name in members:
        if not name.endswith(_TABLES):
            continue
        folder = name.rsplit("/", 1)[0]
        try:
            entries = [(str(e["path_name"]), e.get("use_pickle", True)) for e in _table(reader, name).values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(
                f"{path}: the table '{name}' can't be read ({one_line(error)}); save it again"
            ) from error
        for member, use_pickle in entries:
            if "/" in member:
                raise ModelLoadError(
                    f"{path}: the table '{name}' points at '{member}', outside its folder; save it again"
                )
            plain = not use_pickle and member.startswith(("weight_", "tensor_"))
            (raw if plain else pickled).add(f"{folder}/{member}")
    return raw, pickled


def _table(reader: Any, name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(reader.get_record(name))["config"]
    return table


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch.export's warnings about files and formats off the terminal; failures raise."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
