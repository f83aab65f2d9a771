# Every target makes its own .venv on first use; the second time the stamp file says that nothing is to be done.
# Variables you may set: PYTHON (3.11 or newer), JOBS (test processes), ARGS (passed on to quickstart or pytest).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -n $(JOBS)

.PHONY: help quickstart test test-all browser docs check format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /make \1	/' | expand -t 20

quickstart: .venv/.stamp-run ## Train, compare, evaluate and report on data made on the spot (2 CPU cores, no download)
	$(BIN)/python -m trimtab quickstart $(ARGS)

test: .venv/.stamp-dev ## Fast tests: everything a contributor needs
	@$(PYTEST) -m 'not slow' $(ARGS)

test-all: .venv/.stamp-dev ## All tests, the slow ones too
	@$(PYTEST) $(ARGS)

browser: .venv/.stamp-dev ## The pages in Chromium only: report, live view, documentation
	@TRIMTAB_BROWSER=required $(PYTEST) tests/browser $(ARGS)

docs: .venv/.stamp-dev ## The documentation site, into build/docs/html
	$(TEST_ENV) $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet -c docs . build/docs/html
	@echo "Wrote build/docs/html/index.html"

check: .venv/.stamp-dev ## Format, lint, types, and the documents against the code
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(PYTEST) tests/architecture tests/documents -m 'not slow'

format: .venv/.stamp-dev ## Bring all files into the house format
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean: ## Remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trimtab's pinned versions need Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
		"Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.stamp-run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing trimtab into .venv (a few minutes the first time)"
	$(PIP_INSTALL) --editable .
	@touch $@

.venv/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing trimtab and its development tools into .venv (a few minutes the first time)"
	$(PIP_INSTALL) --editable '.[test,check,trl,peft,view,docs,browser]'
	@touch .venv/.stamp-run $@
