# The project's commands. Each makes .venv first where it is missing; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install demo test bench check format clean

help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

$(INSTALLED): setup.py $(wildcard requirements/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/tested.txt --editable ".[dev]"
	touch $@

install: $(INSTALLED) ## make .venv and install the package with its tools

demo: $(INSTALLED) ## train a tiny LLaVA on handwritten digits and score its answers (about two minutes)
	$(BIN)/python examples/neva_finetune.py
	$(BIN)/python examples/neva_evaluation.py

test: $(INSTALLED) ## the test suite, two tests at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(INSTALLED) ## the benchmarks beside the peers, and docs/benchmarks.md (under 20 minutes)
	$(BIN)/python scripts/benchmarks/all.py

check: $(INSTALLED) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what runs and tests leave behind; .venv stays
	rm -rf nemo_experiments datasets build *.egg-info .pytest_cache .mypy_cache .ruff_cache
