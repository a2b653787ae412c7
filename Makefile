# make demo | test | test-more | chaos | lint | docs | check | bench: each sets up .venv first, from pyproject.toml with constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Processes that run tests; each takes about 3 GiB of memory.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest

.PHONY: setup demo test test-more chaos check lint docs bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/rayseg run pipeline gpc --region demo --config configs/gpc/smoke.yaml --out runs/demo

# One Ray at a time, in a process of its own: two that start at the same time on two cores lose jobs.
# A test process that crashes is not replaced, as xdist would wait for its tests for ever.
test: setup
	$(PYTEST) -m "not (ray or more or chaos)" --numprocesses $(WORKERS) --dist loadfile --max-worker-restart 0
	$(PYTEST) -m "ray and not (more or chaos)"

test-more: setup
	$(PYTEST) -m "more and not (ray or chaos)" --numprocesses $(WORKERS) --dist loadfile --max-worker-restart 0
	$(PYTEST) -m "more and ray and not chaos"

chaos: setup
	$(PYTEST) -m chaos

lint: setup
	$(BIN)/python -m pip check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site; a link to a page that does not exist is an error.
docs: setup
	$(BIN)/python docs/site.py build/pages
	$(BIN)/zensical build --strict

check: lint docs test test-more

bench: setup
	for name in tiles start cam objects predict train_feed; do $(BIN)/python benchmarks/$$name.py || exit 1; done
