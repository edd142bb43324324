"""Counts what became of the fuzzer's modules and prints it with pytest's summary."""

from __future__ import annotations

from collections import Counter

import pytest

VERDICTS = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="session")
def fuzz_verdicts(pytestconfig: pytest.Config) -> Counter[str]:
    """How many random attention modules ended with each verdict, in the whole run."""
    return pytestconfig.stash.setdefault(VERDICTS, Counter())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    verdicts = config.stash.get(VERDICTS, Counter())
    if verdicts:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        terminalreporter.write_line(f"fuzzed attention modules: {verdicts.total()} ({counts})")
