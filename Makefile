PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
RUN    := $(VENV)/bin/python -m

.PHONY: train test test-slow bench lint clean

train: $(READY)            ## train a small 3C1F on digits with TENGraD, SGD and AdamW
	$(VENV)/bin/tengrad-triton train

test: $(READY) lint        ## everything but the tests marked slow
	$(RUN) pytest -m "not slow"

test-slow: $(READY)        ## the tests marked slow
	$(RUN) pytest -m slow

bench: $(READY)           ## the benchmarks that fit this machine, into perf/results and docs/performance.md
	$(RUN) perf

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# One resolver run for everything: torch's pinned build must be chosen before anything that depends on torch.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	touch $@
