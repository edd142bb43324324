"""``lincompile eval --against TEACHER``: runs the comparison, and says what its figures mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from . import common

if TYPE_CHECKING:
    from ..lowering.evaluation.agreement import Writing
    from ..lowering.evaluation.subject import Subject


def show(
    opened: Callable[[str], Subject],
    model: str,
    against: str,
    text: str | list[int],
    options: Writing,
    as_json: bool,
) -> None:
    """Continues prompts with both models and prints the agreement."""
    from ..lowering.evaluation.agreement import compare
    from ..passes.errors import LincompileError

    student, teacher = opened(model), opened(against)
    if isinstance(text, str):
        codec = teacher.codec or student.tokenizer("taking prompts from a text")
        ids = codec.encode(text, special=False)
        if student.codec is not None and student.codec.encode(text, special=False) != ids:
            raise LincompileError(
                f"{model} and {against} read other tokens in the same text, so what they write can't be compared: give "
                "models with one tokenizer"
            )
    else:
        ids = text
    with common.counting("continuing prompts") as advance:
        result = compare(student, teacher, ids, options, advance).record()
    if as_json:
        common.print_json(result)
        return
    grid = Table(show_header=False, box=None)
    grid.add_row("the teacher's next token chosen too, on the teacher's text", f"{result['agreement']:.1%}")
    grid.add_row(
        "tokens until the first difference",
        f"{result['same_tokens']:.1f} of {result['new_tokens']} ({result['same_whole']:.0%} without one)",
    )
    for name, key, form in (
        ("different 4-grams", "distinct", ".1%"),
        ("nats per token, by the teacher's reckoning", "nll", ".3f"),
    ):
        values = result[key]
        grid.add_row(name, f"{values['student']:{form}}, teacher {values['teacher']:{form}}")
    common.stdout().print(grid)
