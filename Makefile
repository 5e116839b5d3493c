# Each target sets up its own environment in .venv if that is missing.
# With an interpreter that has everything already:  make gpu BIN= PY=python3 READY=

PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin/
PY ?= $(BIN)python
READY ?= $(VENV)/.ready

.PHONY: setup demo test check bench gpu clean

setup: $(READY)

# torch first: left to itself, pip takes its newest build and the CUDA libraries with it.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

# Store, heads at four exits, threshold sweep, report and picture in runs/demo.
demo: $(READY)
	$(PY) -m dynamax fit -c configs/demo/fit.yaml
	$(PY) -m dynamax test -c configs/demo/test.yaml

test: $(READY)
	$(PY) -m pytest

check: $(READY)
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(BIN)pyright
	$(BIN)lint-imports --no-logo

bench: $(READY)
	$(PY) -m benchmarks.decode
	$(PY) -m benchmarks.store

gpu: $(READY)
	$(PY) -m pytest -m gpu tests/gpu
	$(PY) -m benchmarks.gpu

clean:
	rm -rf runs build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
