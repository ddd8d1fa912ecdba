# What a contributor needs: `make setup` once, then `make check`. `make` lists the targets.
# In another environment: `make check PYTHON=python`.

VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
# The tests that `make quick` runs: those of the whole house, or of a room, `make quick ROOM=rules`.
ROOM ?=
HOUSE = $(shell find tests -name test_architecture.py -o -name test_contributing.py)

.DEFAULT_GOAL := help
.PHONY: help setup hooks check quick lint types test test-all quickstart docs package format full

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with the library, its tests and its tools
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -e '.[test,dev]'

hooks: ## check every commit before it is made
	$(PYTHON) -m pip install pre-commit
	$(PYTHON) -m pre_commit install

check: lint types test quickstart ## what a change must pass before the rest is tried

quick: lint types ## lint, types and the tests of one room: make quick ROOM=rules
	$(PYTHON) -m pytest $(if $(ROOM),tests/$(ROOM),$(HOUSE))

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

test:
	$(PYTHON) -m pytest

test-all: ## also long tests, frameworks, benchmarks and examples: pip install -e '.[test-all]'
	$(PYTHON) -m pytest --all tests examples

quickstart:
	$(PYTHON) .ci/quickstart.py

docs: ## build the site and run the code on its pages: pip install -e '.[docs]'
	$(PYTHON) -m sphinx -W --keep-going -n -q docs docs/_build/html
	$(PYTHON) .ci/links.py docs/_build/html
	$(PYTHON) -m pytest --dist loadfile docs

package: ## build wheel and source archive, and try them with the base dependencies alone
	PATH="$(abspath $(dir $(PYTHON))):$$PATH" bash .ci/package

format: ## let ruff mend what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

full: ## check a fresh environment with the oldest Python, and one with a newer Python and jax
	bash .ci/run
