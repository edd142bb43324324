"""``python -m lincompile``: the same as the ``lincompile`` command."""

from __future__ import annotations

from .cli.main import main

if __name__ == "__main__":
    main()
