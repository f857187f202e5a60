# `make demo` and `make test` are the two commands. Each first sets up everything it needs in .venv.
#
#   PYTHON=...       the interpreter for .venv (3.11 or later)
#   PIP_ARGS=...     passed to pip, for instance an index with CPU builds of torch (see constraints.txt)
#   DEMO_ARGS=...    passed to the demo, for instance --quick
#   PYTEST_ARGS=...  passed to pytest, for instance tests/test_config.py

IS_RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3.11 python3; do $$p $(IS_RECENT) && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format docs clean

help: ## Print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(INSTALLED) ## Cold start, GRPO and APO on Countdown, compared by Pass@K, in runs/demo
	$(BIN)/python examples/countdown/demo.py --out runs/demo $(DEMO_ARGS)

# Both parts run, so that one call shows everything that is wrong.
test: $(INSTALLED) ## Linters and all tests (those that need a GPU are skipped without one)
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) || status=1; \
	exit $$status

lint: $(INSTALLED) ## Linter, formatter (check only), type checker
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; \
	exit $$status

format: $(INSTALLED) ## Sort imports, mend what the linter can mend, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## Write docs/configuration.md from the schema
	$(BIN)/python tools/document_config.py

install: $(INSTALLED) ## Set up .venv only

# The stamp is written last: an interrupted installation is taken up again.
$(INSTALLED): setup.py constraints.txt
	@$(if $(PYTHON),$(PYTHON) $(IS_RECENT),false) || { \
	    echo "error: found no Python 3.11 or later ('$(PYTHON)'): install one, or name it: make PYTHON=..." >&2; \
	    exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean: ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
