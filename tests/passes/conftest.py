"""Fixtures of the tests of passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import zoo

BUILDERS = """
import torch, zoo
def build():
    torch.manual_seed(7)
    return zoo.NanoGPT().eval()
def with_example():
    return build(), torch.ones(2, 9, dtype=torch.long)
def wide():
    return zoo.NanoGPT(width=64)
def deep():
    return zoo.NanoGPT(layers=3)
def fails():
    raise RuntimeError("no weights today")
def number():
    return 3
constant = 4
class Original(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.block_size = 32
        self.inner = zoo.NanoGPT(last_only=True)
    def forward(self, idx, targets=None):
        return self.inner(idx, targets)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module 'builders' that isn't installed anywhere."""
    (tmp_path / "builders.py").write_text(BUILDERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "builders", raising=False)
    yield tmp_path
    sys.modules.pop("builders", None)


@pytest.fixture(scope="session")
def proved() -> Callable[[str], SimpleNamespace]:
    """``proved(name)``: a zoo model proved once a session: name, module, example, program (not to be changed)."""
    from lincompile.passes.canonicalize import Canonicalize
    from lincompile.passes.capture import capture
    from lincompile.passes.identity import ProveAttention
    from lincompile.passes.pipeline import Pipeline

    cache: dict[str, SimpleNamespace] = {}

    def get(name: str) -> SimpleNamespace:
        if name not in cache:
            if name in zoo.HUGGINGFACE:
                pytest.importorskip("transformers")
            module, example = zoo.build(name)
            program = Pipeline([Canonicalize(), ProveAttention()])(capture(module, example))
            cache[name] = SimpleNamespace(name=name, module=module, example=example, program=program)
        return cache[name]

    return get
