# planearly: `make demo` runs the main job, `make test` the tests; both set everything up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The build of torch: empty takes pip's own (CUDA on Linux, the CPU on a Mac); cpu, cu126, cu130, rocm7.1
# and others take that build from PyTorch's index: make TORCH=cpu demo
TORCH ?=
READY := $(VENV)/.ready$(TORCH:%=-%)
TORCH_VERSION = $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_BUILD = $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH) \
  'torch==$(TORCH_VERSION)+$(TORCH)',torch)
# two processes of one thread each use two cores better than one process of two; conftest.py orders files
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test smoke quick soak lowest newest pythons lm-eval s3 lint site clean

help:
	@echo "make demo    set up, then train and compare small models on an embedded corpus (runs/demo)"
	@echo "make test    set up, then run all tests"
	@echo "make smoke   a small study of every method (runs/study-smoke), minutes"
	@echo "make quick   the tests that take seconds"
	@echo "make soak    kill a small study KILLS times (200), its results must not change"
	@echo "make lowest  some tests with the lowest packages, on Python 3.11 and 3.13 (PYTHONS='3.12 3.13')"
	@echo "make newest  the same with the newest packages"
	@echo "make pythons both"
	@echo "make lm-eval bits per byte in lm-evaluation-harness, which it installs"
	@echo "make s3      reading from and writing to a server of S3, which it installs"
	@echo "make lint    style and types"
	@echo "make site    the documents as a site (build/site)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "planearly needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_BUILD)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[hub,lora,dev]'
	@rm -f $(VENV)/.ready*
	@touch $(READY)

demo: setup
	$(BIN)/planearly run demo --out runs/demo

test: setup
	$(TESTS)

smoke: setup
	$(BIN)/planearly study study-smoke --out runs/study-smoke

quick: setup
	$(TESTS) -m "not slow"

KILLS ?= 200
soak: setup
	$(BIN)/python tests/soak.py --kills $(KILLS) --out runs/soak-$(KILLS)

# both ends of the ranges in pyproject.toml: make pythons PYTHONS=3.12
PYTHONS ?= 3.11 3.13
lowest newest:
	$(PYTHON) tests/pythons.py $@ --pythons $(PYTHONS) $(TORCH:%=--torch %)

pythons:
	$(PYTHON) tests/pythons.py lowest newest --pythons $(PYTHONS) $(TORCH:%=--torch %)

lm-eval: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lm-eval]'
	$(TESTS) -m lm_eval

# in a folder of its own: botocore wants an older python-dateutil than the one that is pinned
S3 := $(CURDIR)/build/s3
s3: setup
	mkdir -p build
	sed '/^python-dateutil/d' constraints.txt > build/s3.txt
	test -d $(S3)/moto || $(BIN)/python -m pip install --quiet --target $(S3) -c build/s3.txt \
	  s3fs 'moto[s3]' flask flask-cors
	PYTHONPATH=$(S3) $(TESTS) -m s3

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

# an environment of its own: what builds the site has no business where the tests run
site:
	test -x build/site-venv/bin/mkdocs || { $(PYTHON) -m venv build/site-venv \
	  && build/site-venv/bin/pip install --quiet 'mkdocs-material>=9.5'; }
	NO_MKDOCS_2_WARNING=1 build/site-venv/bin/mkdocs build --quiet

clean:
	rm -rf $(VENV) runs build dist
