"""Distillation and evaluation text: files, datasets or token ids → one stream of tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..passes.errors import LincompileError
from .tokenizer import TextCodec

SEPARATOR = "\n\n"


def read_tokens(source: Any, tokenizer: Callable[[Path], None] | None) -> Tensor:
    """Token ids, int64 ``[N]``.

    Args:
        source: token ids (a tensor), a list of texts, a ``.txt``, ``.md``, ``.jsonl`` (key "text"), ``.parquet``
            (column "text") or ``.npy`` (token ids) file, or ``hf:name`` (a Hugging Face dataset, split train).
        tokenizer: writes the model's tokenizer into a folder.

    Raises:
        LincompileError: a missing or unreadable file, or text for a model without a tokenizer.
    """
    if isinstance(source, Tensor):
        return source.flatten().long()
    if isinstance(source, (str, Path)) and str(source).endswith(".npy"):
        import numpy as np

        return torch.from_numpy(np.load(existing(source)).astype("int64")).flatten()
    texts = list(source) if isinstance(source, (list, tuple)) else list(read_texts(str(source)))
    if tokenizer is None:
        raise LincompileError(
            "the model came without a tokenizer: give token ids instead of text (a .npy file of integers)"
        )
    with tempfile.TemporaryDirectory(prefix="lincompile-") as folder:
        tokenizer(Path(folder))
        codec = TextCodec(Path(folder))
        ids = codec.encode(SEPARATOR.join(texts))
    if not ids:
        raise LincompileError(f"the text {source} is empty")
    return torch.tensor(ids, dtype=torch.int64)


def existing(source: str | Path) -> Path:
    """The path of a file that exists; a ``LincompileError`` otherwise."""
    path = Path(source)
    if not path.is_file():
        raise LincompileError(f"the text file {path} doesn't exist")
    return path


def read_texts(source: str) -> Iterator[str]:
    """The documents of a file or dataset, in order."""
    if source.startswith("hf:"):
        try:
            from datasets import load_dataset
        except ImportError:
            raise LincompileError("hf: datasets need the 'datasets' package: pip install 'lincompile[hf]'") from None
        yield from (row["text"] for row in load_dataset(source[3:], split="train"))
        return
    path = existing(source)
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet
            except ImportError:
                raise LincompileError(f"{path} needs the 'pyarrow' package: pip install pyarrow") from None
            yield from parquet.read_table(path, columns=["text"])["text"].to_pylist()
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    yield json.loads(line)["text"]
        else:
            yield path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise LincompileError(f"the text file {path} can't be read: {type(error).__name__}: {error}") from error
