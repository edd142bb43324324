"""What a model file is, by its content. The name of the file is never consulted, and nothing in it is run."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO

from ..errors import ModelLoadError

# What a state dict's pickle asks for: containers, tensors and how to rebuild them. torch.load(weights_only=True)
# enforces its own list when the file is read; this one only tells data from pickled modules.
_DATA_MODULES = (
    "torch._utils._rebuild",
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    "torch.serialization._get_layout",
    "torch._tensor._rebuild_",
)
_DATA_GLOBALS = {
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch.save wrote before version 1.6


def sniff(path: str | Path) -> str:
    """Tell the format of a model file or folder.

    Returns ``huggingface`` (a folder with config.json), ``gguf``, ``safetensors``, ``pt2``, ``torchscript``,
    ``state_dict`` (a torch.save file that holds data alone) or ``pickle`` (one that wants classes or functions).
    Raises ``ModelLoadError`` when the file is missing, empty, cut off or of no known format.
    """
    path = Path(path)
    if path.is_dir():
        return _sniff_folder(path)
    if not path.exists():
        raise ModelLoadError(
            f"{path}: no such file or folder; give a local path (nothing is downloaded) or package.module:function"
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelLoadError(f"{path}: can't be read: {error.strerror or error}") from error
    if not head:
        raise ModelLoadError(f"{path}: the file is empty; fetch or save the model again")
    if head[:4] == b"GGUF":
        return "gguf"
    if head[:4] == b"PK\x03\x04":
        return _sniff_zip(path)
    if head[:1] == b"\x80":
        return "pickle" if wanted_globals(path) else "state_dict"
    if len(head) >= 10 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= 100_000_000:
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        raise ModelLoadError(f"{path}: a Git LFS pointer, not the weights; run 'git lfs pull' where it came from")
    raise ModelLoadError(
        f"{path}: not a model format lincompile knows (starts with {head[:8]!r}); "
        "it reads Hugging Face folders, GGUF, safetensors, .pt2 and torch.save files"
    )


def wanted_globals(path: Path) -> list[str]:
    """The classes and functions that a torch.save file asks for beyond plain tensors and containers, sorted.

    The pickle is disassembled, not run. A name that can't be told statically is listed as ``(computed)``.
    """
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in _members(archive, "data.pkl"):
                    with archive.open(name) as record:
                        found |= _globals(record)[0]
        else:
            found = _legacy_globals(path)
    except (ValueError, EOFError, zipfile.BadZipFile, OSError, KeyError, IndexError, struct.error) as error:
        raise ModelLoadError(f"{path}: a truncated or damaged pickle ({error}); fetch or save it again") from error
    return sorted(name for name in found if not _is_data(name))


def _sniff_folder(path: Path) -> str:
    if (path / "lincompile.json").is_file():
        raise ModelLoadError(
            f"{path}: already compiled by lincompile; use 'lincompile generate {path}', or compile the original model"
        )
    if (path / "config.json").is_file():
        return "huggingface"
    if (path / "adapter_config.json").is_file():
        raise ModelLoadError(
            f"{path}: a PEFT adapter without its base model; give the base model's folder and --adapter {path}"
        )
    inside = sorted(p.name for p in path.iterdir() if p.suffix in {".gguf", ".pt", ".pt2", ".safetensors", ".bin"})
    hint = f"; give one of its files: {', '.join(inside[:3])}" if inside else "; give a Hugging Face model folder"
    raise ModelLoadError(f"{path}: a folder without config.json{hint}")


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if _members(archive, "archive_format"):
                kind = archive.read(_members(archive, "archive_format")[0]).strip()
                if kind == b"pt2":
                    return "pt2"
                raise ModelLoadError(f"{path}: an archive of format {kind!r}, which lincompile doesn't read")
            if "serialized_exported_program.json" in names:
                raise ModelLoadError(f"{path}: a .pt2 of torch 2.7 or older; export it again with torch 2.11 or later")
            if _members(archive, "constants.pkl") or any("/code/" in name for name in names):
                return "torchscript"
            if _members(archive, "data.pkl"):
                return "pickle" if wanted_globals(path) else "state_dict"
    except zipfile.BadZipFile as error:
        raise ModelLoadError(
            f"{path}: a truncated or damaged zip archive ({error}); fetch or save the model again"
        ) from error
    raise ModelLoadError(f"{path}: a zip archive without a model in it (first entries: {', '.join(names[:3])})")


def _members(archive: zipfile.ZipFile, file_name: str) -> list[str]:
    """Members of that name at the top of the archive or in its one folder, where torch puts them."""
    return [name for name in archive.namelist() if name.split("/")[-1] == file_name and name.count("/") <= 1]


def _legacy_globals(path: Path) -> set[str]:
    """Globals of a torch.save file of before 1.6 (five pickles, then raw storages) or of a plain pickle."""
    found: set[str] = set()
    with path.open("rb") as file:
        names, first = _globals(file)
        found |= names
        if first == _LEGACY_MAGIC:
            for _ in range(4):  # protocol version, system info, the object, the storage keys
                found |= _globals(file)[0]
    return found


def _globals(file: IO[bytes]) -> tuple[set[str], object]:
    """The globals of one pickle, and the first constant on its stack (which tells a legacy torch file)."""
    found: set[str] = set()
    strings: list[str] = []  # string constants in order of appearance, for STACK_GLOBAL's two operands
    memo: dict[int, str] = {}
    first: object = None
    for opcode, argument, _ in pickletools.genops(file):
        if first is None and opcode.name not in {"PROTO", "FRAME"}:
            first = argument
        if opcode.name in {"GLOBAL", "INST"}:
            name = str(argument).replace(" ", ".", 1)
            found.add(name.replace("__builtin__.", "builtins.", 1))  # Python 2's name, which protocol 2 still writes
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]) if len(strings) >= 2 else "(computed)")
        elif opcode.name in {"EXT1", "EXT2", "EXT4"}:
            found.add("(computed)")
        elif "UNICODE" in opcode.name or opcode.name in {"STRING", "BINSTRING", "SHORT_BINSTRING"}:
            strings.append(str(argument))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif opcode.name in {"BINPUT", "LONG_BINPUT", "PUT"}:
            memo[int(str(argument))] = strings[-1] if strings else ""
        elif opcode.name in {"BINGET", "LONG_BINGET", "GET"}:
            strings.append(memo.get(int(str(argument)), ""))
    return found, first


def _is_data(name: str) -> bool:
    if name in _DATA_GLOBALS or name.startswith(_DATA_MODULES):
        return True
    module, _, attribute = name.rpartition(".")
    if module == "torch":  # torch.float32 and torch.FloatStorage
        return attribute.endswith("Storage") or attribute.startswith(
            ("float", "int", "uint", "bfloat", "bool", "complex")
        )
    return False
