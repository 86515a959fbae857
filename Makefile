# Everything runs in an environment of its own, .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SHARE  ?= 1
PROVE  ?= slow and not postgres

.DEFAULT_GOAL := help
.PHONY: help install demo test prove prove-postgres check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

# torch and torchvision are installed together: a torchvision that does not match torch breaks lightning.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps sweeps  # W&B's schema of sweeps; the package itself wants an older numpy
	@touch $@

install: $(STAMP) ## make .venv with the package and what its tests need (about 6 GB)

demo: $(STAMP) ## train a multi-size net on pictures drawn here, test it, and say where to look (2 minutes)
	$(BIN)/spp train name=demo experiment=table2c_multi_size

test: $(STAMP) ## the tests (2 minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not postgres"

prove: $(STAMP) ## the slower proofs (20 minutes); SHARE=0.1 does a tenth of the kills
	SPP_PROVE_SHARE=$(SHARE) $(BIN)/python -m pytest -n 2 -m "$(PROVE)"

prove-postgres: $(STAMP) ## sweeps of four workers on a PostgreSQL started for it (needs Debian's postgresql)
	$(BIN)/python -m pip install --quiet "psycopg[binary]>=3.2"
	$(BIN)/python -m pytest -m postgres tests/test_sweep_postgres.py

check: $(STAMP) ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(STAMP) ## put the code into the house's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove the environment and what tools left behind, never runs or data
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
