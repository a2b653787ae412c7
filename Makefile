# make demo | test | chaos | check | bench: each sets up .venv first, from pyproject.toml with constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test chaos check lint bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/rayseg run pipeline gpc --region demo --config configs/gpc/smoke.yaml --out runs/demo

test: setup
	$(BIN)/python -m pytest

chaos: setup
	$(BIN)/python -m pytest -m chaos

lint: setup
	$(BIN)/python -m pip check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

bench: setup
	for name in tiles start cam objects predict train_feed; do $(BIN)/python benchmarks/$$name.py || exit 1; done
