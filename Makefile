PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
VENV        ?= .venv
READY       := $(VENV)/.ready
DOCS_READY  := $(VENV)/.docs-ready
RUN         := $(VENV)/bin/python -m
PYTEST      := $(RUN) pytest
# Processes that tests run in, as many as there are cores up to four; each takes from another when it has none left.
WORKERS     ?= --numprocesses auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install train quick test tests test-slow test-pinn test-trainers bench docs dist smoke lint format clean

help:                      ## list what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY)          ## make .venv and install the package, its tools and the pinned torch

train: $(READY)            ## train a small 3C1F on digits with TENGraD, by its defaults and as in the paper, SGD and AdamW
	$(VENV)/bin/tengrad-triton train

quick: $(READY)            ## stop at the first failing test of the method, the optimizer or a kernel: under a minute
	$(PYTEST) -x -q -k "not compiled" tests/test_exact.py tests/test_controls.py tests/test_optimizer.py \
		tests/test_state.py tests/test_refusals.py tests/test_cpu.py
	TRITON_INTERPRET=1 $(PYTEST) -x -q -k "takes_any_strides and not project" tests/test_kernels.py

test: lint tests           ## lint, then run every test that is not marked slow

# Those of trainers have a process of their own: with accelerate imported, torch 2.13 may crash as it traces an op.
TRAINERS    := tests/test_transformers.py tests/test_accelerate.py tests/test_lightning.py tests/test_peft.py \
	tests/test_trainers_distributed.py
APART       := $(addprefix --ignore=,$(TRAINERS)) --deselect "tests/test_documented.py::test_python_runs[docs/guides/trainers.md]"

tests: $(READY)            ## run them without linting
	$(PYTEST) $(WORKERS) -m "not slow" $(APART)
	$(PYTEST) -q -m "not slow" $(TRAINERS)

test-slow: $(READY)        ## run the tests marked slow
	$(PYTEST) $(WORKERS) -m slow $(APART)
	$(PYTEST) -q -m slow $(TRAINERS)

test-pinn: $(READY)         ## install PINA and DeepXDE beside the rest, and run the tests that need them
	$(RUN) pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train,rivals,trainers,dev,pinn]'
	$(PYTEST) -q tests/test_adapters.py tests/test_adapters_deepxde.py tests/test_study_pinn_frameworks.py

test-trainers: $(READY)     ## run all tests of transformers, Accelerate, Lightning and PEFT
	$(PYTEST) -q $(TRAINERS)
	$(PYTEST) -q tests/test_documented.py -k trainers

bench: $(READY)            ## run the benchmarks that fit this machine, into perf/results and docs/performance.md
	$(RUN) perf

docs: $(DOCS_READY)         ## build the website of docs/ into site/; a warning, such as a broken link, is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

dist: $(READY)             ## build the sdist and the wheel into dist/, and check them and CITATION.cff
	rm -rf dist
	$(RUN) pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[release]'
	$(RUN) build
	$(RUN) twine check --strict dist/*
	$(VENV)/bin/cffconvert --validate

# The installation takes up to 7 GB, until it has been used. `make smoke PYTHON=python3.13 TORCH=2.14.1` tests another pair.
TORCH       ?= 2.13.0
smoke: dist                ## install the wheel and the sdist into a clean environment, and use them
	$(RUN) release.smoke dist --python $(PYTHON) --torch $(TORCH)

lint: $(READY)             ## check style (ruff) and types (mypy); change nothing
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(READY)           ## fix what ruff can fix, and lay out the code
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:                     ## remove .venv, builds, runs, the website and caches
	rm -rf $(VENV) runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache

# One resolver run for everything: torch's pinned build must be chosen before anything that depends on torch.
$(READY): pyproject.toml $(CONSTRAINTS)
	@echo "Installing tengrad-triton with PyTorch, Triton and its tools into $(VENV): a few minutes, once."
	@began=$$(date +%s) && \
	$(PYTHON) -m venv $(VENV) && \
	$(RUN) pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train,rivals,trainers,dev]' && \
	echo "Installed into $(VENV) in $$(($$(date +%s) - began)) s." && \
	touch $@

$(DOCS_READY): $(READY)
	@echo "Installing mkdocs into $(VENV): under a minute, once."
	$(RUN) pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train,docs]'
	touch $@
