"""Options and markers shared by every test."""

from __future__ import annotations

import gc
import importlib.util
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow (minutes each)")
    parser.addoption("--run-docs", action="store_true", help="also run the shell commands of README.md and docs/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    # The pages of the documentation take minutes each: begun last, they would leave one process waiting for the other.
    items.sort(key=lambda item: item.nodeid.split("[")[0] != "tests/test_docs.py::test_page_runs")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --run-slow"))
        if "gpu" in item.keywords and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and Triton"))


def pytest_collection_finish() -> None:
    """Looks for garbage less often, and not among what is imported: a tenth of the suite's time went into that."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
