# Everything runs in .venv, made on first use. The first `make` compiles llama.cpp (minutes).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
MODEL  ?= pico
SHELL  := bash
# Quiet, but for what takes minutes.
INSTALL = install() { set -o pipefail; $(PIP) install --progress-bar off --constraint constraints.txt \
	--editable "$$1" | awk -f scripts/compiling.awk; }; install

.DEFAULT_GOAL := help
.PHONY: help setup chat demo serve test test-slow lint types imports check fmt screenshot wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@$(INSTALL) .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(INSTALL) '.[dev]'
	@touch $@

setup: $(VENV)/.dev  ## make .venv with everything for development

chat: $(VENV)/.runtime  ## chat with pico (converted on first use); MODEL=file.gguf for another
	$(BIN)/nanorun chat $(MODEL)

demo: $(VENV)/.runtime  ## print one answer, its thinking apart
	$(BIN)/nanorun run $(MODEL) "What is 4785 + 697?" --think high

serve: $(VENV)/.runtime  ## OpenAI-style endpoint on 127.0.0.1:8080
	$(BIN)/nanorun serve $(MODEL)

test: $(VENV)/.dev  ## run the tests (minutes)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu"

test-slow: $(VENV)/.dev  ## run the long ones too: fuzzing, kills, grids, 500 random histories
	$(BIN)/python -m pytest -m "slow"

lint: $(VENV)/.dev  ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev  ## mypy --strict
	$(BIN)/mypy

imports: $(VENV)/.dev  ## which package may import which
	$(BIN)/lint-imports

check: lint types imports test  ## all that CI runs

fmt: $(VENV)/.dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

screenshot: $(VENV)/.runtime  ## draw docs/chat.svg anew
	$(BIN)/python scripts/screenshot.py

wheel: $(VENV)/.dev  ## build the wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove .venv and what tools left behind
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
