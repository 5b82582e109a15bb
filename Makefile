# Every task around this repository: `make` lists them. On a Linux machine with Python 3.10 or newer, a C++ compiler and
# a network, each of them first installs what it needs into .venv and builds what has changed.

ifneq ($(words $(CURDIR)),1)
$(error This folder has a space in its path, which make cannot work with: $(CURDIR))
endif

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CUDA_TOOLKIT ?= cuda-toolkit[nvcc,cudart,cccl]==13.0.*
ARGS ?=
SECONDS ?= 60

CPU_LIBRARY := src/fused_conv_bn/_cpu.so
CUDA_LIBRARY := src/fused_conv_bn/_cu13.so
SOURCES := setup.py wheels/matrix.json $(wildcard build_tools/*.py) $(shell find csrc -type f)
CLANG_FORMATTED := $(shell find aoti csrc benchmarks tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
STATE := build/make

# VENV= (empty) uses $(PYTHON) as it is and installs nothing.
ifneq ($(strip $(VENV)),)
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
BASE_PYTHON := $(or $(shell command -v $(PYTHON) 2>/dev/null),$(PYTHON))
INSTALLED := $(VENV)/.installed
else
PY := $(or $(shell command -v $(PYTHON) 2>/dev/null),$(PYTHON))
BIN := $(patsubst %/,%,$(dir $(PY)))
INSTALLED :=
endif

# torch looks for ninja in PATH.
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The compute capabilities of this machine's GPUs. CUDA 13 compiles for 7.5 and newer.
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| awk '/^[0-9]+\.[0-9]+$$/ && $$1 >= 7.5' | sort -u)
# An in-place build is for this machine. 9.0 stands in where there is no GPU.
ifneq ($(strip $(TORCH_CUDA_ARCH_LIST)),)
ARCHS := $(strip $(TORCH_CUDA_ARCH_LIST))
else
ARCHS := $(or $(GPU_ARCHS),9.0)
unexport TORCH_CUDA_ARCH_LIST
endif

say = @printf '%s\n' "make: $(1)"

.PHONY: help demo test fuzz soak bench build wheel compat docs lint format clean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make demo     check and time the fused ops against PyTorch on this machine'
	@echo 'make test     run the tests; ARGS="-k name -x" goes to pytest'
	@echo 'make bench    run the benchmark; ARGS="--help" lists its options'
	@echo 'make fuzz     random calls of every op against float64, SECONDS=60; ARGS="--help" lists its options'
	@echo 'make soak     mixed calls from several threads, SECONDS=3600 for an hour: memory may not grow'
	@echo 'make build    build the libraries in place, for the GPU at hand'
	@echo 'make wheel    build the wheel for all supported GPUs into wheels/dist; ARGS="all" also those for one CUDA each'
	@echo 'make compat   test the wheel of wheels/dist next to many versions of torch and Python'
	@echo 'make docs     build the site of docs/ into build/site, and check its links'
	@echo 'make lint     check style and types; make format repairs what a tool can'
	@echo 'make clean    delete what was built'
	@echo
	@echo 'PYTHON=python3.12          the Python that .venv is made of'
	@echo 'TORCH=torch==2.14.1        another torch'
	@echo 'TORCH_CUDA_ARCH_LIST=9.0   compute capabilities to compile for'
	@echo 'PYTHON=/path/python VENV=  use that Python as it is and install nothing'

demo: build
	$(call say,demo)
	@$(PY) -m fused_conv_bn demo $(ARGS)

bench: build
	$(call say,benchmark)
	@$(PY) -m benchmarks $(ARGS)

# Also without a GPU the tests read the CUDA library's machine code. In an environment that make installed no model may
# be missing.
test: export FUSED_CONV_BN_REQUIRE_MODELS := $(if $(INSTALLED),1,$(FUSED_CONV_BN_REQUIRE_MODELS))
test: $(CUDA_LIBRARY)
	$(call say,tests)
	@$(PY) -m pytest $(ARGS)

fuzz: build
	$(call say,random calls)
	@PYTHONPATH=$(CURDIR)/tests:$(PYTHONPATH) $(PY) -m fuzz --seconds $(SECONDS) $(ARGS)

soak: build
	$(call say,mixed calls)
	@PYTHONPATH=$(CURDIR)/tests:$(PYTHONPATH) $(PY) -m fuzz.soak --seconds $(SECONDS) $(ARGS)

# The CUDA library takes longer to build: without a GPU, only a torch that is built for CUDA asks for it.
build: $(INSTALLED)
ifneq ($(GPU_ARCHS)$(strip $(TORCH_CUDA_ARCH_LIST)),)
	@$(MAKE) --no-print-directory $(CUDA_LIBRARY)
else
	@if $(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; \
		then $(MAKE) --no-print-directory $(CUDA_LIBRARY); \
		else $(MAKE) --no-print-directory $(CPU_LIBRARY); fi
endif

wheel: $(INSTALLED)
	@$(PY) wheels/build.py $(ARGS)

compat:
	$(call say,compatibility (20 GB of downloads and half an hour or more for all combinations))
	@$(PYTHON) wheels/compat.py $(ARGS)

# Takes Python 3.11 or newer. The variable: no notice of mkdocs' successors at every build.
docs: $(INSTALLED)
	$(call say,the site)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(INSTALLED)
	$(call say,ruff)
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check .
	$(call say,mypy)
	@$(PY) -m mypy
	$(call say,clang-format)
	@clang-format --dry-run --Werror $(CLANG_FORMATTED)
	$(call say,shellcheck and actionlint)
	@shellcheck .ci/run
	@actionlint $(wildcard .github/workflows/*.yml)

format: $(INSTALLED)
	$(call say,ruff and clang-format)
	@$(PY) -m ruff check --quiet --fix --exit-zero .
	@$(PY) -m ruff format --quiet .
	@clang-format -i $(CLANG_FORMATTED)

clean:
	$(call say,deleting what was built; .venv stays)
	@rm -rf build wheels/dist src/*.egg-info src/fused_conv_bn/_c*.so .mypy_cache .ruff_cache .pytest_cache
	@find src tests benchmarks build_tools -name __pycache__ -prune -exec rm -rf {} +

# ---- the virtual environment -----------------------------------------------------------------------------------------

# A file that holds a setting, touched when the setting changes: what depends on the file is then made again.
record = @mkdir -p $(@D); echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@

ifneq ($(INSTALLED),)
WANTED := $(PYTHON) $(TORCH) $(CUDA_TOOLKIT)

$(VENV)/.wanted: FORCE
	$(call record,$(WANTED))

$(INSTALLED): requirements/dev.txt requirements/docs.txt requirements/models.txt $(VENV)/.wanted
	$(call say,installing $(TORCH) and the development tools into $(VENV); PyPI has 3 GB of CUDA libraries for torch)
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON=...")'
	@$(BASE_PYTHON) -m venv --clear $(VENV)
	@echo '$(WANTED)' > $(VENV)/.wanted
	@$(PY) -m pip install --quiet '$(TORCH)' '$(CUDA_TOOLKIT)' -r requirements/dev.txt -r requirements/docs.txt
	@$(PY) -m pip install --quiet --no-deps -r requirements/models.txt
	@echo '$(CURDIR)/src' > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fused_conv_bn.pth
	@touch $@
endif

# ---- the libraries, in place -----------------------------------------------------------------------------------------

# $(1): environment, $(2): arguments. Shows the output only if it fails.
define setup_py
	@command -v $${CXX:-c++} > /dev/null || { echo 'A C++ compiler is needed, for example: apt install g++' >&2; exit 1; }
	@mkdir -p $(STATE)
	@$(1) $(PY) setup.py $(2) > $(STATE)/log 2>&1 || { tail -n 80 $(STATE)/log; exit 1; }
endef

$(CPU_LIBRARY): $(SOURCES) | $(INSTALLED)
	$(call say,building $@)
	$(call setup_py,FUSED_CONV_BN_CUDA=0,build_ext --inplace)
	@touch $@

$(STATE)/archs: FORCE
	$(call record,$(ARCHS))

$(CUDA_LIBRARY): $(SOURCES) $(STATE)/archs | $(INSTALLED) $(CPU_LIBRARY)
	$(call say,building $@ for compute capability $(ARCHS))
	$(call setup_py,FUSED_CONV_BN_CUDA=1 TORCH_CUDA_ARCH_LIST='$(ARCHS)',build_ext --inplace)
	@touch $(CPU_LIBRARY) $@
