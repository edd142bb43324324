"""Helpers for tests of bad input: the one line a user must see, and a pickle that would do harm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lincompile.passes.errors import LincompileError
from lincompile.passes.formats.load import load_model


def refusal(source: Any, **options: Any) -> str:
    """The message of the error that loading must raise: one line, of the family the CLI prints."""
    with pytest.raises(LincompileError) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


class Payload:
    """Pickles as a call that creates a folder: reading it safely must not."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)
