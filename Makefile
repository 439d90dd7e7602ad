# Every target sets up what it needs: a virtual environment, pinned requirements, the compiled kernels.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Tests run in two processes; threads that wait do not spin on the other's core.
JOBS ?= 2
PARALLEL = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
SOURCES := setup.py pyproject.toml .ci/requirements.txt $(wildcard csrc/*) $(wildcard csrc/common/*)

.PHONY: demo test test-all lint bench gpu mutants cross-compile clean

demo: $(READY)
	$(BIN)/petal-kernels demo

test: $(READY)
	$(BIN)/python -m pytest -q -m "timing and not slow"
	$(PARALLEL) -m "not slow and not cross_compile and not gpu and not timing"

test-all: $(READY)
	$(BIN)/python -m pytest -q -m "timing"
	$(PARALLEL) -m "not gpu and not timing"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.run op
	$(BIN)/python -m benchmarks.run layer --no-gate
	$(BIN)/python -m benchmarks.run qformer --no-gate

# On a machine with a CUDA device; uses the environment's own python where PYTHON is given.
gpu:
	$(PYTHON) -m pytest -q tests/test_ops.py tests/test_contract.py tests/test_philox.py

mutants: $(READY)
	$(BIN)/python -m tests.mutants

cross-compile: $(READY)
	$(BIN)/python -m pytest -q -m cross_compile

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -r .ci/requirements.txt
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build petal_kernels/lib petal_kernels/_host*.so $(READY)
