# One door. Every target works from a fresh clone and needs only Python 3.11+ with pip.
#   make PYTHON=python3.12 setup     another interpreter
#   make LOCK=/dev/null setup        the newest versions that pyproject.toml allows, not the tested ones

PYTHON ?= python3
VENV ?= .venv
LOCK ?= .ci/requirements.lock

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install --constraint $(LOCK)
INPUTS := pyproject.toml .ci/requirements.lock

# A stamp is newer than its inputs exactly when the environment still matches them.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help setup tiny test test-all check fix bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(RUN) ## make the virtual environment and install the package

tiny: $(RUN) ## the tiny recipe: raw documents to an evaluated model and a report
	$(BIN)/pensar run recipes/tiny.yaml

test: $(DEV) ## the fast tests
	$(BIN)/python -m pytest -m "not slow"

test-all: $(DEV) ## every test
	$(BIN)/python -m pytest

check: $(DEV) ## format, lint, types, floors
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports

fix: $(DEV) ## format, and repair what the linter can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV) ## every benchmark, one JSON object a line
	@for script in benchmarks/[a-z]*.py; do $(BIN)/python -m "benchmarks.$$(basename $$script .py)" || exit 1; done

docs: $(DOCS) ## the documentation as a site in build/docs
	$(BIN)/mkdocs build --strict --quiet --site-dir build/docs

clean: ## remove the environment and what tools left behind; runs/ stays
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pensar needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)

$(RUN): $(INPUTS) | $(BIN)/python
	@echo "installing Pensar into $(VENV) (a few minutes the first time)"
	$(PIP) --editable ".[all]"
	@touch $@

$(DEV): $(INPUTS) | $(BIN)/python
	@echo "installing Pensar and what its tests need into $(VENV)"
	$(PIP) --editable ".[dev]"
	@touch $@ $(RUN)

$(DOCS): $(INPUTS) | $(BIN)/python
	$(PIP) --editable ".[docs]"
	@touch $@
