"""Adapters' files: damaged, edited, of students that training didn't leave as they are, and of other students' runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distil_models import equal, linear, proved, trained, windows
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lincompile.passes.distil.adapter import (
    CONTENTS,
    apply_adapter,
    check_adapter,
    save_adapter,
    save_record,
    settings_of,
)
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.errors import LincompileError
from lincompile.passes.half_lives import HalfLives
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.quantize import Quantize

BIAS = "lincompile_attention.0.gate.bias"
Change = Callable[[dict[str, Tensor], dict[str, str]], object]


@pytest.fixture(scope="module")
def teacher() -> Program:
    return proved()


@pytest.fixture(scope="module")
def student(teacher: Program) -> Program:
    made = linear(teacher)
    transfer(teacher, made, windows(), Transfer(steps=2))
    return made


@pytest.fixture
def file(teacher: Program, student: Program, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "a.safetensors", teacher, student)
    return tmp_path / "a.safetensors"


def edited(file: Path, change: Change, contents: bool = False) -> None:
    """Writes the file anew, changed; its hash of ``contents`` is left out unless it is to stay."""
    with safe_open(str(file), "pt") as opened:
        metadata, tensors = dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, metadata)
    if not contents:
        del metadata[CONTENTS]
    save_file(tensors, str(file), metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors[BIAS].fill_(torch.nan), f"'{BIAS}' holds NaN or infinity; copy or train it again"),
        (lambda tensors, _: tensors[BIAS][:1].fill_(-torch.inf), f"'{BIAS}' holds NaN or infinity"),
        (lambda tensors, _: tensors.update({BIAS: tensors[BIAS].int()}), f"'{BIAS}' is of torch.int32"),
        (lambda tensors, _: tensors.update({"lincompile_lora/a/b/up": torch.ones(2)}), "factors for 'a/b', which this"),
    ],
)
def test_values_that_no_training_leaves_are_refused(teacher: Program, file: Path, change: Change, message: str) -> None:
    edited(file, change)
    with pytest.raises(LincompileError, match=message):
        apply_adapter(file, teacher, linear(teacher))


@pytest.mark.parametrize(
    "change",
    [
        lambda _, metadata: metadata.update(sites="{"),
        lambda _, metadata: metadata.update(sites="[1]"),
        lambda _, metadata: metadata.update(sites="{}"),
        lambda _, metadata: metadata.update(sites=metadata["sites"].replace("-1.0", "low")),
        lambda _, metadata: metadata.update(sites=metadata["sites"].replace("lawcat", "lawcat+wide")),
        lambda _, metadata: metadata.update(sites=json.dumps({"a": 3})),
        lambda _, metadata: metadata.update(switches="{{"),
        lambda _, metadata: metadata.update(record="[1]"),
        lambda _, metadata: metadata.pop("teacher"),
    ],
)
def test_words_that_are_damaged_are_one_line(teacher: Program, file: Path, change: Change) -> None:
    edited(file, change)
    for read in (settings_of, lambda path: apply_adapter(path, teacher, linear(teacher))):
        with pytest.raises(LincompileError, match=r"a\.safetensors is damaged: its metadata can't be read \(\w+Error:"):
            read(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors[BIAS][:1].add_(1.0),
        lambda _, metadata: metadata.update(sites=metadata["sites"].replace("floor -1.0", "floor -0.5")),
    ],
)
def test_an_edited_file_is_noticed(teacher: Program, file: Path, change: Change) -> None:
    """A bit more or less in a weight, or in what the sites are, gives a student like any other, and a worse one."""
    edited(file, change, contents=True)
    with pytest.raises(LincompileError, match="was damaged or edited: its contents' hash differs; copy it again"):
        apply_adapter(file, teacher, linear(teacher))


def test_files_that_say_no_hash_are_applied(teacher: Program, student: Program, file: Path) -> None:
    edited(file, lambda *_: None)
    applied = linear(teacher)
    apply_adapter(file, teacher, applied)
    assert equal(trained(applied), {name: value.half().float() for name, value in trained(student).items()})


def test_sites_alone_can_be_compared(teacher: Program, file: Path) -> None:
    """As a dry run does, which has no weights."""
    check_adapter(file, linear(teacher))
    with pytest.raises(LincompileError, match=r"is for 2 sites with lawcat: give --attn lawcat$"):
        check_adapter(file, linear(teacher, "gla"))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (HalfLives(4.0), "no adapter: the half-lives of this student were multiplied by 4 after training"),
        (Quantize("w6a8"), "no adapter: the student is quantized"),
    ],
)
def test_only_what_training_left_is_saved(teacher: Program, tmp_path: Path, after: Any, message: str) -> None:
    """With --half-lives again, memories would be sixteen times as long; norms may be tuned to rounded weights."""
    changed = Pipeline([after])(linear(teacher))
    with pytest.raises(LincompileError, match=message):
        save_adapter(tmp_path / "b.safetensors", teacher, changed)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_run_on_from_another_adapter_is_another_run(
    teacher: Program, student: Program, file: Path, tmp_path: Path
) -> None:
    """Its checkpoint holds weights that came of the first one's."""
    other = linear(teacher)
    transfer(teacher, other, windows(seed=3), Transfer(steps=2))
    save_adapter(tmp_path / "b.safetensors", teacher, other)

    def further(adapter: Path) -> Any:
        begun = linear(teacher)
        apply_adapter(adapter, teacher, begun)
        return transfer(teacher, begun, windows(), Transfer(steps=1), checkpoint=tmp_path / "c")

    further(file)
    assert further(file).resumed_at == 1
    with pytest.raises(LincompileError, match="of a student that another adapter or earlier stage had trained"):
        further(tmp_path / "b.safetensors")


def test_another_record_takes_the_place_of_the_first(file: Path, teacher: Program) -> None:
    fresh = linear(teacher)
    save_record(file, {"tokens": 5})
    assert apply_adapter(file, teacher, fresh) == {"tokens": 5}
    assert fresh.metadata["adapter"] == {"file": file.name, "tokens": 5}
    edited(file, lambda tensors, _: tensors[BIAS].add_(1), contents=True)
    with pytest.raises(LincompileError, match="was damaged or edited"):
        save_record(file, {})
