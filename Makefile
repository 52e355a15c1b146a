# make demo   environment, build, prune a Vision Transformer on images, the table
# make test   environment, build, every test on every backend and instruction set
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# The torch to build against; a range takes the newest that pip allows.
TORCH ?= torch>=2.10
BIN := $(VENV)/bin
RUN := $(BIN)/python
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-sanitize gpu-static lint format bench clean

$(VENV)/.tools: pyproject.toml
	@echo "environment: $(VENV) (torch takes a few minutes the first time)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade pip
	@$(INSTALL) "$(TORCH)" torchvision "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.28" "ninja>=1.11"
	@touch $@

$(VENV)/.demo: $(VENV)/.tools $(SOURCES)
	@echo "build: compiled kernels"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.tools $(SOURCES)
	@echo "build: compiled kernels, and the CUDA kernels for the emulator"
	@# Not stripped: the emulator names kernels by the full symbol table.
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(INSTALL) --no-build-isolation -C cmake.define.PYVITFAST_BUILD_TESTS=ON \
		-C install.strip=false --editable ".[test,bench,export,dev]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@$(BIN)/pyvitfast prune --out out/demo --overwrite

test: $(VENV)/.test
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) tools/run_tests.py

test-sanitize: $(VENV)/.test
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) tools/run_sanitizers.py

gpu-static: $(VENV)/.test
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) tools/gpu_static.py

bench: $(VENV)/.test
	@$(RUN) -m benchmarks.run --json out/bench.json

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/.test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache
