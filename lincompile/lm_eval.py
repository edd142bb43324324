"""``python -m lincompile.lm_eval …``: the command line of lm_eval, which then knows ``--model lincompile``.

lm_eval finds models by their registration only, so this module must be imported first: in Python,
``import lincompile.lm_eval``; on the command line, this module in the place of ``lm_eval``.
"""

from __future__ import annotations

import sys

from .lowering.harness import LincompileLM
from .passes.errors import LincompileError

__all__ = ["LincompileLM"]


def main() -> None:
    """Runs lm_eval's own command line; a user's mistake is one line and exit code 1."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LincompileError as error:
        sys.exit(f"lincompile: {error}")


if __name__ == "__main__":
    main()
