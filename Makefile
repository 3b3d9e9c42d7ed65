# planearly: `make demo` runs the main job, `make test` the tests; both set everything up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# two processes of one thread each use two cores better than one process of two
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test smoke quick lint clean

help:
	@echo "make demo    set up, then train and compare small models on an embedded corpus (runs/demo)"
	@echo "make test    set up, then run all tests"
	@echo "make smoke   a small study of every method (runs/study-smoke), minutes"
	@echo "make quick   the tests that take seconds"
	@echo "make lint    style and types"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "planearly needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[hub,lora,dev]'
	@touch $(READY)

demo: setup
	$(BIN)/planearly run demo --out runs/demo

test: setup
	$(TESTS)

smoke: setup
	$(BIN)/planearly study study-smoke --out runs/study-smoke

quick: setup
	$(TESTS) -m "not slow"

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist
