# The same few commands for people and for CI. Nothing is needed beforehand but Python 3.11 to 3.13, git and make.
.DEFAULT_GOAL := help
SHELL := /bin/sh

# The first interpreter here that TensorFlow has wheels for; `make PYTHON=... test` overrides it.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo "$$python" && break; done)
VENV ?= .venv
EXTRA ?= cpu
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed-$(EXTRA)

# Two runs, one after the other: TensorFlow and XLA keep what they compile until a process ends, gigabytes of it.
FIRST_HALF = tests/layers tests/ops tests/activations tests/losses
PYTEST = -m pytest -n 2 --dist worksteal --durations=10
HALVES = first=0; second=0; \
	$(1) $(PYTEST) $(2) $(FIRST_HALF) || first=$$?; \
	$(1) $(PYTEST) $(2) $(FIRST_HALF:%=--ignore=%) || second=$$?; \
	exit $$((first + second))

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found. Install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[$(EXTRA),dev,examples]"
	@$(BIN)/python -m pip install --quiet --no-deps --group no-deps
	@touch $@

install: $(INSTALLED) ## make .venv and install the package with its development tools

demo: $(INSTALLED) ## train the digits in three policies, compare, export, verify
	@$(BIN)/python -m examples.digits

test: $(INSTALLED) ## the quick tests, or with FILE=... those of one file or folder
	@$(if $(FILE),$(BIN)/python -m pytest --durations=10 $(FILE),$(call HALVES,$(BIN)/python))

test-all: $(INSTALLED) ## the whole test suite
	@$(call HALVES,$(BIN)/python,-m 'slow or not slow')

test-matrix: ## the suite on TensorFlow 2.20 and on 2.21
	@for minor in 20 21; do \
	  $(MAKE) --no-print-directory VENV=.venv-tf2$$minor install && \
	  .venv-tf2$$minor/bin/python -m pip install --quiet "tensorflow-cpu==2.$$minor.*" && \
	  ($(call HALVES,.venv-tf2$$minor/bin/python)) || exit 1; \
	done

lint: $(INSTALLED) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED) ## time everything in benchmarks/ against stock Keras; wants a machine that does nothing else
	@$(BIN)/python -m benchmarks.optimizer
	@$(BIN)/python -m benchmarks.layers
	@$(BIN)/python -m benchmarks.attention
	@$(BIN)/python -m benchmarks.distribution
	@$(BIN)/python -m benchmarks.training
	@$(BIN)/python -m benchmarks.ceiling

bench-aot: ## memory of layers and steps on TPU v5e and H100, by their compilers; needs neither, and may share the machine
	@$(MAKE) --no-print-directory VENV=.venv-aot EXTRA=cpu,aot install
	@.venv-aot/bin/python -m benchmarks.aot

build: $(INSTALLED) ## wheel and sdist into dist/
	@$(BIN)/python -m build

clean: ## remove what the other commands made
	rm -rf .venv .venv-tf2* .venv-aot build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis examples/output

.PHONY: help install demo test test-all test-matrix lint format bench bench-aot build clean
