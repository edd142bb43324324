"""Gluon kernels under Triton's interpreter, which has no Gluon: their source as plain Triton, layouts left out.

What is left is what a kernel computes and from where; which thread holds what, and with it barriers, are the GPU's.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
import triton.language as tl


class Shared:
    """Shared memory that whole tensors are stored to."""

    def __init__(self, dtype: Any, shape: list[Any], layout: None) -> None:
        self.shape = [int(size) for size in shape]

    def store(self, value: Any) -> None:
        assert list(value.shape) == self.shape
        self.value = value

    def load(self, layout: None) -> Any:
        return self.value

    def slice(self, start: Any, length: Any, axis: Any) -> Any:
        """Some of the rows of a matrix, of which there are a multiple of so many."""
        assert int(axis) == 0 and int(start) % int(length) == 0
        part, count = Shared(None, [length, self.shape[1]], None), self.shape[0] // int(length)
        whole, which = self.value.reshape([count, *part.shape]), tl.arange(0, count)[:, None, None]
        part.value = tl.sum(tl.where(which == int(start) // int(length), whole, 0), 0)
        return part


def _layout(*parts: Any) -> None:
    return None


_LANGUAGE = SimpleNamespace(
    BlockedLayout=_layout, SliceLayout=_layout, SwizzledSharedLayout=_layout, num_warps=lambda: 8,
    arange=lambda start, end, layout: tl.arange(start, end), zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype),
    convert_layout=lambda value, layout, assert_trivial: value, allocate_shared_memory=Shared,
    program_id=lambda axis: tl.program_id(axis), num_programs=lambda axis: tl.num_programs(axis),
    where=lambda condition, a, b: tl.where(condition, a, b), minimum=lambda a, b: tl.minimum(a, b),
    load=lambda pointer, mask, other: tl.load(pointer, mask=mask, other=other), sum=lambda x, axis: tl.sum(x, axis),
    int32=tl.int32, int64=tl.int64, float32=tl.float32,
)  # fmt: skip


def load(name: str, folder: Path) -> Any:
    """The module of that name, its kernels as Triton's; the source that the interpreter reads is put into a folder."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    rewritten = folder / f"{name.rpartition('.')[2]}.py"
    source = Path(found.origin).read_text().replace("gl.constexpr", "tl.constexpr")
    rewritten.write_text(source.replace("\nfrom triton", "\nimport triton.language as tl\nfrom triton", 1))
    gluon: Any = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.language = triton.jit, _LANGUAGE
    experimental: Any = types.ModuleType("triton.experimental")
    experimental.gluon = gluon
    spec = importlib.util.spec_from_file_location(name, rewritten)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"triton.experimental": experimental, "triton.experimental.gluon": gluon}):
        spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
