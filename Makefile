# Everything a person does in this repository. Needs Python 3.11 or later with pip, and make; nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MAKEFLAGS += --no-print-directory

# Tests on real models and data are skipped where this folder is missing.
ifneq ($(wildcard ../shared/assets),)
export LORALAB_ASSETS ?= $(abspath ../shared/assets)
endif

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	@$(BIN)/loralab demo

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary src/loralab
	@said=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$said"; exit 1; }
	@$(BIN)/codespell $(wildcard src docs examples benchmarks recipes *.md)  # tests misspell on purpose

bench: $(INSTALLED)
	@set -e; for script in benchmarks/[!_]*.py; do $(BIN)/python "$$script"; done

clean:
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once; again when pyproject.toml or constraints.txt change)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
