# Set-up, checks and a first run. A virtual environment in .venv is made once and reused.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
# The one exact version that has to be there before the rest: deepspeed's own build reads torch.
TORCH := torch==2.13.0
ARGS ?=

.PHONY: quickstart test lint format setup
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.ready ## make .venv with the pinned versions

quickstart: $(VENV)/.ready ## prune a real small model and repair it on this machine; ARGS="..." are passed on
	$(PY) launch/quickstart.py $(ARGS)

lint: $(VENV)/.ready ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy seft_ds launch

test: lint ## style, types and all tests, with GPUs hidden; ARGS="-m 'not slow'" are passed to pytest
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

format: $(VENV)/.ready ## rewrite the files in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Order matters. torch comes first and by an exact pin, so that no later step picks another build
# of it; deepspeed is built without pip's isolated environment, which would fetch a second torch.
$(VENV)/.ready: setup.cfg constraints.txt Makefile
	@echo "[set-up 1/4] virtual environment in $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip setuptools wheel
	@echo "[set-up 2/4] $(TORCH)"
	@$(PIP) install -c constraints.txt $(TORCH)
	@echo "[set-up 3/4] deepspeed, built against that torch"
	@$(PIP) install -c constraints.txt --no-build-isolation deepspeed
	@echo "[set-up 4/4] everything else, and this project in place"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
