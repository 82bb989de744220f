# Every target sets up what it needs: a virtual environment in .venv with the package and its tools.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin

.DEFAULT_GOAL := help

.PHONY: help setup run report test test-oldest docs bench lint types format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed ## create .venv and install the package with its tools

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: setup ## prune and train a small network on real digits
	$(BIN)/python run.py pruner=synflow sparsity=0.98

report: setup ## tables, figures and a page of results/, in report/
	$(BIN)/pai-bench report results -o report

test: setup ## run the tests (twenty minutes, no GPU, no download)
	$(BIN)/python -m pytest -n 2

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable '.[parts,test]'
	@touch $@

test-oldest: .venv-oldest/installed ## run the fast tests on the oldest libraries that pyproject.toml admits
	$(OLDEST)/python -m pytest -n 2 -m 'not slow'

docs: setup ## build the documentation as a site, in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: setup ## measure the claims about speed (minutes; nothing else should run)
	$(BIN)/python -m benchmarks

lint: setup ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## check types
	$(BIN)/mypy

format: setup ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and build products; results/ and data/ stay
	rm -rf .venv .venv-oldest build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
