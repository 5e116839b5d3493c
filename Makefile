# Each target sets up its own environment in .venv if that is missing.
# With an interpreter that has everything already:  make gpu BIN= PY=python3 READY=

PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin/
PY ?= $(BIN)python
READY ?= $(VENV)/.ready

.PHONY: setup demo demo-mamba test quick fuzz check bench cross gpu clean

setup: $(READY)

# torch first: left to itself, pip takes its newest build and the CUDA libraries with it.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	rm -rf *.egg-info  # an older one would hide new entry points from whoever runs here
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

# Store, heads at four exits, threshold sweep; report, picture and page in runs/demo.
demo: $(READY)
	$(PY) -m dynamax fit -c configs/demo/fit.yaml
	$(PY) -m dynamax test -c configs/demo/test.yaml
	$(PY) -m dynamax report runs/demo --out runs/demo/report.html

# The same on the Mamba-2 in assets/, which was trained with exits.
demo-mamba: $(READY)
	$(PY) -m dynamax fit -c configs/demo-mamba/fit.yaml
	$(PY) -m dynamax test -c configs/demo-mamba/test.yaml
	$(PY) -m dynamax report runs/demo-mamba --out runs/demo-mamba/report.html

# Everything, in as many processes as there are cores, four at most; tests use a thread each.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

# One case of each test and no slow one, for while one works.
quick: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal --quick

# Whatever can be typed, for FUZZ_MINUTES; a fault is printed as KIND:SEED, and had again by FUZZ_CASE=KIND:SEED.
fuzz: $(READY)
	FUZZ_MINUTES=$(or $(FUZZ_MINUTES),10) FUZZ_CASE=$(FUZZ_CASE) FUZZ_START=$(or $(FUZZ_START),1000) $(PY) -m tests.fuzz

check: $(READY)
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(BIN)pyright
	$(BIN)lint-imports --no-logo

# Each writes its figures to benchmarks/results.
bench: $(READY)
	$(PY) -m benchmarks.decode --out benchmarks/results/decode.json
	$(PY) -m benchmarks.decode --model mamba2-130m --prompts 4 --tokens 24 --out benchmarks/results/decode-mamba2.json
	$(PY) -m benchmarks.decode --model mamba-130m --prompts 4 --tokens 24 --out benchmarks/results/decode-mamba.json
	$(PY) -m benchmarks.chunks --out benchmarks/results/chunks.json
	$(PY) -m benchmarks.gates --out benchmarks/results/gates.json
	$(PY) -m benchmarks.candidates --out benchmarks/results/candidates.json
	$(PY) -m benchmarks.certified --out benchmarks/results/certified-float16.json
	$(PY) -m benchmarks.compiled --rounds 3 --out benchmarks/results/compiled-float16.json
	$(PY) -m benchmarks.store --rounds 5 --out benchmarks/results/store.json

# Every gate on every backbone; the siblings lie in assets/. What is measured already is kept.
cross: $(READY)
	$(PY) -m benchmarks.cross --out benchmarks/results/cross.json --markdown runs/cross.md --plot docs/cross.png

# In parts by worth, 12.5 minutes on a CUDA device; some of it: make gpu OPTIONS="--only shapes --minutes 5".
# In small on the CPU, before a GPU is at hand: make gpu REHEARSE=1
gpu: $(READY)
	$(PY) -m benchmarks.gpu $(if $(REHEARSE),--rehearse) $(OPTIONS)

clean:
	rm -rf runs build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
