# `make demo` and `make test` are the two commands. Each first sets up everything it needs, in .venv and (a CPU
# build of SGLang, which wants other versions of the same packages) in .venv-sglang.
#
#   PYTHON=...       the interpreter for .venv (3.11 or later)
#   PIP_ARGS=...     passed to pip, for instance an index with CPU builds of torch (see constraints.txt)
#   ROLLOUT=sglang   the demo draws its samples with a real SGLang server
#   DEMO_ARGS=...    passed to the demo, for instance --quick
#   PYTEST_ARGS=...  passed to pytest, for instance tests/test_config.py

IS_RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3.11 python3; do $$p $(IS_RECENT) && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SGLANG_VENV := .venv-sglang
SGLANG_PYTHON := $(SGLANG_VENV)/bin/python
SGLANG_INSTALLED := $(SGLANG_VENV)/installed
SGLANG_FILES := tools/sglang_cpu
ROLLOUT ?= embedded
FIND_SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
HAS_PYTHON = $(if $(PYTHON),$(PYTHON) $(IS_RECENT),false) || { \
    echo "error: found no Python 3.11 or later ('$(PYTHON)'): install one, or name it: make PYTHON=..." >&2; \
    exit 1; }

.DEFAULT_GOAL := help
.PHONY: help install sglang-cpu both browser slurm demo test test-slow test-slurm coverage lint format docs dist clean

help: ## Print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(INSTALLED) $(if $(filter sglang,$(ROLLOUT)),$(SGLANG_INSTALLED)) ## Cold start, GRPO and APO on Countdown, compared by Pass@K, in runs/demo
	$(BIN)/python examples/countdown/demo.py --out runs/demo --rollout $(ROLLOUT) $(DEMO_ARGS)

# Both parts run, so that one call shows everything that is wrong.
test: both browser slurm ## Linters and all tests (those that need a GPU are skipped without one)
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(BIN)/python -m pytest -n 3 $(PYTEST_ARGS) || status=1; \
	exit $$status

coverage: $(INSTALLED) ## How much of the pure modules their tests run (at least 95 %)
	$(BIN)/python -m tests.pure_coverage

test-slow: both slurm ## The tests that `make test` leaves out (Slurm, servers that are lost, coverage)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-slurm: both slurm ## All tests of examples/slurm on a real Slurm, those too slow for `make test` too
	$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS) tests/test_slurm.py

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

dist: $(INSTALLED) ## Wheel and source distribution, in dist/
	$(BIN)/python -m build

install: $(INSTALLED) ## Set up .venv only

sglang-cpu: $(SGLANG_INSTALLED) ## Set up .venv-sglang: the real SGLang server on a CPU, for tests and the demo

both: # at the same time: most of it is waiting for downloads
	@$(MAKE) --no-print-directory -j2 $(INSTALLED) $(SGLANG_INSTALLED)

# Tests of the HTML report open it in Chromium, and are skipped without one.
browser: # quiet, and only where it can: nothing else needs it
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	    && echo "installing Chromium for the tests of the report" && timeout 120 apt-get -qq update >/dev/null 2>&1 \
	    && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get -qq install --yes --no-install-recommends \
	        chromium fonts-dejavu-core >/dev/null 2>&1; } \
	    || echo "no Chromium: the tests that open the report in a browser are skipped"

# Tests of examples/slurm start a Slurm of their own, and are skipped without one.
NO_SERVICES := /usr/sbin/policy-rc.d
slurm: # quiet, and only where it can; Debian asks NO_SERVICES whether an installation may start services
	@command -v slurmctld >/dev/null || test -x /usr/sbin/slurmctld || { test "$$(id -u)" = 0 \
	    && command -v apt-get >/dev/null && echo "installing Slurm for the tests of examples/slurm" \
	    && { test -e $(NO_SERVICES) || { printf '#!/bin/sh\nexit 101\n' > $(NO_SERVICES) && chmod +x $(NO_SERVICES) \
	        && trap 'rm -f $(NO_SERVICES)' EXIT; }; } && timeout 120 apt-get -qq update >/dev/null 2>&1 \
	    && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get -qq install --yes --no-install-recommends \
	        slurmctld slurmd iproute2 procps >/dev/null 2>&1; } \
	    || echo "no Slurm: the tests that start one are skipped"

# The stamp is written last: an interrupted installation is taken up again.
$(INSTALLED): setup.py constraints.txt
	@$(HAS_PYTHON)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	touch $@

# torch with what it asks for, whichever build the index serves; the rest as listed (what SGLang asks for are
# CUDA wheels). Python's own packages folder then gets the files that let this run without CUDA.
$(SGLANG_INSTALLED): $(SGLANG_FILES)/requirements.txt $(wildcard $(SGLANG_FILES)/site_packages/* $(SGLANG_FILES)/site_packages/*/*)
	@$(HAS_PYTHON)
	@echo "installing SGLang for CPUs into $(SGLANG_VENV): about 2 minutes and 2.6 GB, pip is quiet"
	test -x $(SGLANG_VENV)/bin/pip || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PYTHON) -m pip install --quiet $(PIP_ARGS) --constraint $(SGLANG_FILES)/requirements.txt torch
	$(SGLANG_PYTHON) -m pip install --quiet $(PIP_ARGS) --no-deps --requirement $(SGLANG_FILES)/requirements.txt
	cp -R $(SGLANG_FILES)/site_packages/. "$$($(SGLANG_PYTHON) $(FIND_SITE_PACKAGES))"
	touch $@

clean: ## Remove both environments and caches; runs/ stays
	rm -rf $(VENV) $(SGLANG_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
