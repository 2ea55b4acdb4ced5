# `make book` and `make test` work in a fresh clone with empty caches; everything else is a part of them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONHASHSEED := 0
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help env book html test quick lint nbval lab real gpu clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1|/' | column -t -s'|'

env: $(STAMP)  ## make .venv and install hclib with the book and development tools

$(STAMP): pyproject.toml
	@echo "== environment: $(VENV) ($(PYTHON))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no $(PYTHON) here: run 'make PYTHON=python3.12 env' with any Python 3.11 to 3.13"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

book: env  ## execute the demo notebooks that changed, build the HTML, say where it is
	@echo "== encoder weights and demo data"
	$(BIN)/hclib data get weights demo
	@echo "== notebooks, profile demo"
	$(BIN)/hclib run --profile demo
	@$(MAKE) --no-print-directory html

html: env  ## build the HTML from the executed notebooks
	@echo "== pages"
	$(BIN)/jupyter-book build . -n -W --keep-going --path-output build
	@echo "The book: build/_build/html/index.html"

test: env lint  ## everything that continuous integration checks
	@echo "== tests"
	$(BIN)/python -m pytest
	@$(MAKE) --no-print-directory nbval

quick: env  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

lint: env  ## style, doors between the rooms, notebooks as text
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

nbval: env  ## rerun the executed demo notebooks and compare their checked cells
	@echo "== nbval: the committed demo notebooks, rerun without their Records"
	rm -rf build/records
	HCLIB_RECORDS=$(CURDIR)/build/records $(BIN)/python -m pytest --nbval-lax --nbval-cell-timeout=900 book/results/demo -p no:cacheprovider

lab: env  ## JupyterLab; open notebooks/*.py with "Open With > Notebook"
	$(BIN)/jupyter lab --notebook-dir=. --ServerApp.contents_manager_class=jupytext.TextFileContentsManager

real: env  ## execute the notebooks on the real data sets (see README), then build the HTML
	$(BIN)/hclib data get weights
	$(BIN)/hclib run --profile real
	@$(MAKE) --no-print-directory html

gpu: env  ## replace faiss-cpu by the CUDA build
	$(BIN)/python -m pip uninstall -y faiss-cpu
	$(BIN)/python -m pip install -e '.[gpu]' --no-deps && $(BIN)/python -m pip install 'faiss-gpu-cu12>=1.9'

clean:  ## remove the environment and the built pages (caches and results stay)
	rm -rf $(VENV) build
