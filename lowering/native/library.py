"""The optional library of native operators for onnxruntime: compiled where there is a compiler, never required.

A file exported with ``layout="native"`` calls operators of the domain ``lincompile`` and holds a function body of the
same name for each, written with the stock operators. A session for which this library is registered runs its kernels,
any other runs the bodies. The sources lie beside this module; the first use compiles them into the user's cache.

``LINCOMPILE_NATIVE``: ``0`` switches the library off; ``avx512vnni``, ``avx2`` or ``portable`` asks for those kernels.
By default only kernels that were measured to be worth it run: all of those for AVX-512 with VNNI; on other processors
with AVX2 all but that of linear attention alone, which stays onnxruntime's.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...kernels import compiled
from ...passes.errors import LincompileError

if TYPE_CHECKING:
    import onnxruntime

DOMAIN = "lincompile"
# The layout of onnxruntime's interface was checked against these; a later major version may change it.
OLDEST_RUNTIME, NEXT_RUNTIME = (1, 32), (2, 0)
_SOURCES = (
    *("ort.h", "operator.h", "library.cpp", "int6.h", "int6.cpp", "int6_x86.cpp", "attention.h", "attention.cpp"),
    *("lawcat.h", "lawcat_kernel.h", "lawcat_operator.h", "layers.h", "layers_kernel.h", "layers_operators.h"),
    *("vectors.h", "for_processor.h", "kernels.cpp"),
)
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
_DEFAULT_FEATURES = {"avx512_vnni", "avx2"}  # one of them, as /proc/cpuinfo spells them
_OPSET_IMPORT = 8  # ModelProto.opset_import, in onnx.proto
_VARIABLE = "LINCOMPILE_NATIVE"
_log = logging.getLogger(__name__)


def library_path() -> Path:
    """The compiled library, for ``SessionOptions.register_custom_ops_library``; compiled first where it isn't yet.

    Raises:
        LincompileError: it is switched off, has no kernels for this processor, can't be compiled (no C++ compiler), or
            the onnxruntime installed isn't one that it was written for.
    """
    wanted = os.environ.get(_VARIABLE, "")
    if wanted == "0":
        raise LincompileError(f"the native library is switched off ({_VARIABLE}=0)")
    _check_runtime()
    if wanted in ("", "1") and not _DEFAULT_FEATURES & compiled.processor_flags():
        raise LincompileError(
            "the native library has no kernels for this processor that are known to be faster than onnxruntime's "
            f"(they need AVX2, on Linux); {_VARIABLE}=portable runs plain C++"
        )
    path = build()
    kernels = _kernels(path)
    if kernels is None:
        raise LincompileError(
            f"{_VARIABLE}={wanted} names no kernels that run on this processor: use avx512vnni, avx2 or portable"
        )
    return path


def register(options: onnxruntime.SessionOptions) -> str | None:
    """Register the library with a session's options.

    Returns:
        The name of its kernels; None where it can't be had and the stock kernels run instead (the log says why).

    Raises:
        LincompileError: it can't be had though ``LINCOMPILE_NATIVE`` asks for it.
    """
    try:
        path = library_path()
    except LincompileError as error:
        if os.environ.get(_VARIABLE, "") not in ("", "0"):
            raise
        _log.info("stock kernels run instead of native ones: %s", error)
        return None
    options.register_custom_ops_library(str(path))
    kernels = _kernels(path)
    _log.info("native operators run, on %s kernels", kernels)
    return kernels


def build(folder: Path | None = None) -> Path:
    """Compile the library into ``folder`` (default: the user's cache) unless it is there; its path.

    Raises:
        LincompileError: no C++ compiler (``$CXX``, ``c++``, ``g++`` or ``clang++``), or it failed.
    """
    here = Path(__file__).parent
    sources = {name: (here / name).read_text() for name in _SOURCES}
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    try:
        return compiled.build("native", "C++", sources, compilers, _FLAGS, folder)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else "no message")
        raise LincompileError(f"the native library can't be compiled: {first[:300]}") from error
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        advice = "; install one, such as g++" if isinstance(error, FileNotFoundError) else ""
        raise LincompileError(f"the native library can't be compiled: {error}{advice}") from error


def _check_runtime() -> None:
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2] if part.isdigit())
    if not OLDEST_RUNTIME <= version < NEXT_RUNTIME:
        oldest, following = (".".join(map(str, bound)) for bound in (OLDEST_RUNTIME, NEXT_RUNTIME))
        raise LincompileError(
            f"the native library was written for onnxruntime ≥ {oldest}, < {following}, this is "
            f"{onnxruntime.__version__}"
        )


def _kernels(path: Path) -> str | None:
    try:
        library = _loaded(path)
    except OSError as error:
        raise LincompileError(f"the native library can't be loaded: {error}") from error
    name = library.lincompile_kernels()
    return None if name is None else str(name.decode())


@functools.cache
def _loaded(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.lincompile_kernels.restype = ctypes.c_char_p
    return library


def calls_native_operators(model: Path) -> bool:
    """Whether an ONNX file imports the domain of the native operators.

    Reads the names and lengths of the file's outermost fields only, not the weights inside them. False for what isn't
    an ONNX file: its reader says so.
    """
    with model.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while (tag := _varint(file)) is not None:
            number, kind = tag >> 3, tag & 7
            length = _varint(file)  # of a field of bytes; the value itself of a number
            if length is None or kind not in (0, 2) or (kind == 2 and length > size - file.tell()):
                return False
            if number == _OPSET_IMPORT and kind == 2:
                if DOMAIN.encode() in file.read(length):
                    return True
            elif kind == 2:
                file.seek(length, os.SEEK_CUR)
    return False


def _varint(file: BinaryIO) -> int | None:
    """The next number in protobuf's variable length; None at the end of the file or where there is none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    return None
