# One command each; every target sets up what it needs in .venv (make PYTHON=... chooses another interpreter).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-quick test-slow test-arviz1 python-arviz1 lint house audit bench docs clean

BIN := .venv/bin
PYTHON = $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable

help: ## say what there is (the default)
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .venv/.installed ## set up .venv with the pinned versions

demo: .venv/.installed ## identify a double pendulum; figures and numbers go to out/double_pendulum
	@echo "demo: examples/double_pendulum.py $(ARGS)"
	@$(BIN)/python examples/double_pendulum.py $(ARGS)

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
NONE_CHOSEN = 5# pytest's exit status if ARGS="-k ..." leaves no test

test: .venv/.installed ## run the tests (ARGS="-k guide" and the like are passed on)
	@echo "test: pytest $(ARGS), quick tests, which check shapes and types of every call"
	@$(PYTEST) -m "not slow and not long" $(ARGS) || [ $$? -eq $(NONE_CHOSEN) ]
	@echo "test: pytest $(ARGS), slow tests"
	@$(PYTEST) -m "slow and not long" --jaxtyping-packages= $(ARGS) || [ $$? -eq $(NONE_CHOSEN) ]

test-quick: .venv/.installed ## run the quick tests only (five minutes or so)
	@$(PYTEST) -m "not slow and not long" $(ARGS)

test-slow: .venv/.installed ## try hard to break it, and write docs/reliability.md's table (ten minutes or so)
	@echo "test-slow: pytest --figures docs/results/reliability.json $(ARGS)"
	@$(BIN)/python -m pytest --figures docs/results/reliability.json $(ARGS) \
		$(addprefix tests/test_,storage.py checkpoint.py bad_data.py training.py dynamics.py calibration.py certify.py)
	@$(BIN)/python docs/results/reliability.py

test-arviz1: .venv-arviz1/.installed .venv/.installed ## the ArviZ adapter under ArviZ 1.x, in an environment without torch
	@$(BIN)/python -m pytest tests/test_arviz_adapter.py

lint: .venv/.installed ## ruff, formatting, types, and the order of the rooms
	@echo "lint: ruff check"
	@$(BIN)/ruff check .
	@echo "lint: ruff format"
	@$(BIN)/ruff format --check .
	@echo "lint: mypy"
	@$(BIN)/mypy
	@echo "lint: import-linter"
	@$(BIN)/lint-imports --no-cache > .venv/import-linter.txt || { cat .venv/import-linter.txt; exit 1; }

house: .venv/.installed ## measure the package in a reader's units, beside their limits
	@$(BIN)/python tests/house.py $(ARGS)

audit: .venv-audit/.installed ## look up every pinned version among the known vulnerabilities (needs a network)
	@echo "audit: pip-audit of constraints.txt"
	@.venv-audit/bin/python tests/audit.py

bench: .venv/.installed-bench ## measure steps and times against plain Pyro and JAX (an hour; leave the machine alone meanwhile)
	@for script in elbo_step grid_step scaling time_to_identify; do \
		echo "bench: tests/benchmarks/$$script.py"; $(BIN)/python tests/benchmarks/$$script.py || exit 1; done

docs: .venv/.installed-docs ## build docs/_build/html, a warning being an error
	@echo "docs: sphinx"
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

clean: ## remove .venv, caches and built docs (what is in out/ stays)
	@rm -rf .venv .venv-arviz1 .venv-audit .pytest_cache .ruff_cache .mypy_cache .hypothesis docs/_build build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
		[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: install it, or say make PYTHON=/path/to/it" >&2; exit 1; }; \
		echo "venv: creating .venv with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv .venv; \
	fi
	@echo "venv: installing the versions in constraints.txt (a minute, longer on a slow line)"
	@$(INSTALL) '.[test]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	@echo "venv: adding what the docs need"
	@$(INSTALL) '.[test,docs]'
	@touch $@

.venv/.installed-bench: .venv/.installed
	@echo "venv: adding what the benchmarks compare with"
	@$(INSTALL) '.[test,bench]'
	@touch $@

.venv-audit/.installed: constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: install it, or say make PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip-audit
	@touch $@

PYTHON_ARVIZ1 = $(shell for p in python3.14 python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9].*/bin/python); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
ARVIZ1 := arviz==1.3.0 arviz-base==1.3.1 arviz-stats==1.3.3 arviz-plots==1.3.2 h5netcdf==1.8.2 h5py==3.16.0

python-arviz1: # print the Python for ArviZ 1.x, or nothing
	@echo $(PYTHON_ARVIZ1)

.venv-arviz1/.installed:
	@[ -n "$(PYTHON_ARVIZ1)" ] || { echo "Python 3.12 or newer is needed: say make test-arviz1 PYTHON_ARVIZ1=/path/to/it" >&2; exit 1; }
	@$(PYTHON_ARVIZ1) -m venv .venv-arviz1
	@.venv-arviz1/bin/python -m pip install --quiet --disable-pip-version-check $(ARVIZ1) pytest
	@touch $@
