# Every target sets up what it needs: a virtual environment, pinned requirements, the compiled kernels.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Of `make gpu`: how long, and where its results go.
MINUTES ?= 25
OUT     ?= build/gpu
# Of `make fuzz`: calls on the CPU backends, and seconds for each of the GPU kernels' stand-ins.
CALLS   ?= 10000
SEED    ?= 0
KERNEL_SECONDS ?= 30
# Tests run in two processes; threads that wait do not spin on the other's core.
JOBS ?= 2
PARALLEL = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
SOURCES := setup.py pyproject.toml .ci/requirements.txt $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# pip's errors, not its warnings.
INSTALL = PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --progress-bar off
# Of `make wheel`: 0 leaves the CUDA library out. What torch brings is not ours to ship.
WHEEL_CUDA ?= 1
NOT_OURS = $(foreach lib,libtorch_cpu.so libtorch_cuda.so libc10.so,--exclude $(lib))

.PHONY: demo docs test test-all lint fuzz bench readme-tables gpu mutants peft-suite cross-compile wheel clean

demo: $(READY)
	$(BIN)/petal-kernels demo

test: $(READY)
	$(BIN)/python -m pytest -q -m "timing and not slow"
	$(PARALLEL) -m "not slow and not spare and not cross_compile and not gpu and not timing"

test-all: $(READY)
	$(BIN)/python -m pytest -q -m "timing"
	$(PARALLEL) -m "not gpu and not timing"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.run op
	$(BIN)/python -m benchmarks.run layer --no-gate
	$(BIN)/python -m benchmarks.run model --no-gate

# The figures of README.md and docs/ from the result files that they name.
readme-tables: $(READY)
	$(BIN)/python -m benchmarks.tables --write

# The site, in build/site; needs nothing of the package but its source.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.docs: .ci/docs.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -r .ci/docs.txt
	@touch $@

# On a machine with a CUDA device, with the environment's own python; the same command again resumes.
gpu:
	$(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) --out $(OUT)

# Calls of the operators with drawn arguments, each checked: fixed by SEED, as many as one likes.
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --calls $(CALLS) --seed $(SEED) --seconds $(KERNEL_SECONDS) --jobs $(JOBS)

mutants: $(READY)
	$(BIN)/python -m tests.mutants --jobs $(JOBS)

# PEFT's own tests with LoRA, as they are and with every model fused; their source is downloaded.
peft-suite: $(READY)
	$(BIN)/python -m tests.peft_suite

cross-compile: $(READY)
	PETAL_BUILD_CUDA=1 PETAL_CUDA_ARCHS="80;90;100" $(BIN)/python setup.py -q build_ext --inplace
	$(PARALLEL) -m cross_compile

# For any machine: every instruction set, three GPU generations, any Python; needs nvcc.
wheel: $(READY)
	$(BIN)/python -m pip install -q -r .ci/wheel.txt
	rm -rf build/wheel build/lib
	PETAL_BUILD_HOST=0 PETAL_BUILD_FRONT=0 PETAL_BUILD_CUDA=$(WHEEL_CUDA) PETAL_CUDA_ARCHS="80;90;100" \
	PETAL_CPU_ISAS="avx2;avx512" $(BIN)/python -m build --no-isolation --outdir build/wheel .
	$(BIN)/python -m auditwheel repair --only-plat --wheel-dir dist $(NOT_OURS) build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/

$(READY): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[1 of 3] torch and what else is pinned in .ci/requirements.txt, from the package index"
	@$(INSTALL) --upgrade pip
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) -r .ci/requirements.txt
	@echo "[2 of 3] the kernels that this machine can run"
	@$(BIN)/python setup.py -q build_ext --inplace
	@echo "[3 of 3] the package"
	@$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build petal_kernels/lib petal_kernels/_host*.so petal_kernels/_front*.so $(READY)
