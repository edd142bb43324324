"""``python -m lincompile.lm_eval …``: the command line of lm_eval, which then knows ``--model lincompile``.

lm_eval (up to 0.4.13) has no plug-ins: it finds models by their registration only, so this module must be imported
before it looks for one. In Python, ``import lincompile.lm_eval``; on the command line, this module in the place of
``lm_eval``, or ``lm_eval`` itself with a task file that names :func:`unchanged`.
"""

from __future__ import annotations

import sys
from typing import TypeVar

from .lowering.evaluation.harness import LincompileLM
from .passes.errors import LincompileError

__all__ = ["LincompileLM", "unchanged"]
Documents = TypeVar("Documents")


def unchanged(documents: Documents) -> Documents:
    """The documents as they are: ``process_docs: !function lincompile.lm_eval.unchanged`` in a task's YAML file.

    lm_eval reads task files that are given by their path before it looks for the model, and their functions with them.
    """
    return documents


def main() -> None:
    """Runs lm_eval's own command line; a user's mistake is one line and exit code 1."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LincompileError as error:
        sys.exit(f"lincompile: {error}")


if __name__ == "__main__":
    main()
