"""A tiny model on disk, its artefact, and a way to run the command line as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lincompile.cli.main import run as run_cli

VOCAB = 60
MODULE = '''
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width, heads, backwards=False):
        super().__init__()
        self.heads, self.backwards, self.bias = heads, backwards, None
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, -1)
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        mask = torch.ones(length, length, dtype=torch.bool).triu() if self.backwards else None
        mask = mask if self.bias is None else self.bias[:, :length, :length]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A plain language model: no Hugging Face code anywhere."""

    def __init__(self, vocab=VOCAB, width=32, heads=2, layers=2, positions=128):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Plain(nn.Module):
    """No attention at all."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, VOCAB)

    def forward(self, tokens):
        return self.head(torch.relu(self.layer(self.tokens(tokens))))


def build():
    torch.manual_seed(0)
    return Model()


def backwards():
    model = build()
    model.blocks[0].backwards = True
    return model


def learned():
    """Like T5: one bias per head and distance, of the first block, in every block."""
    model = build()
    model.blocks[0].bias = nn.Parameter(torch.randn(2, 128, 128))
    model.blocks[1].bias = model.blocks[0].bias
    return model


def plain():
    torch.manual_seed(0)
    return Plain()
'''.replace("VOCAB", str(VOCAB))


class Result:
    """What one run of the command line left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one error line; fails where there are more or a traceback."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("lincompile: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().splitlines()[-1] == lines[0], "nothing follows the error line"
        return lines[0].removeprefix("lincompile: ")


Run = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: Path) -> Run:
    """Runs the command line in this process, in the folder of ``small_model.py``."""
    monkeypatch.chdir(module.parent)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = run_cli([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_model.py``, importable from its folder."""
    file = tmp_path_factory.mktemp("model") / "small_model.py"
    file.write_text(MODULE)
    return file


@pytest.fixture(scope="session")
def artefact(module: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_model:build`` compiled by the command line in a process of its own."""
    folder = tmp_path_factory.mktemp("artefact") / "out"
    command = [sys.executable, "-m", "lincompile", "small_model:build", "--attn", "gla", "--quant", "w6a8", "--json"]
    done = subprocess.run([*command, "-o", str(folder)], cwd=module.parent, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["rewritten"] == 2
    assert document["output"] == str(folder)
    return folder
