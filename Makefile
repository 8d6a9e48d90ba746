# Everything a fresh clone needs: `make train` or `make test`. `make` alone lists the targets.
#
# Variables: ARGS (more options for the program), FILE (what `make train` runs), VENV, PYTHON (the
# interpreter that makes the environment, 3.10 to 3.12), RLLIB_DREAMER_APT=0 (never call apt-get).

VENV ?= .venv
FILE ?= tuned_examples/walker.py
ARGS ?=
BENCH_DIR ?= benchmarks/results
BIN := $(VENV)/bin
export VENV PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup install gl train test test-all check format bench reproduce clean
MAKEFLAGS += --no-print-directory

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: install gl  ## make .venv or bring it up to date, check headless OpenGL

install:
	@bash scripts/setup.sh install

gl: install
	@bash scripts/setup.sh gl

train: setup  ## set up, then train walker-walk from pixels (FILE=, ARGS=)
	@exec $(BIN)/rllib train file $(FILE) $(ARGS)

test: setup  ## set up, then the test suite without its slow part, two files at a time (ARGS=)
	@exec $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-all: setup  ## set up, then the whole test suite, slow tests too (ARGS=)
	@exec $(BIN)/python -m pytest $(ARGS)

check: install  ## ruff, format and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install  ## rewrite the code as ruff wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup  ## a short set of every benchmark, one table in BENCH_DIR (ARGS=)
	@exec $(BIN)/python benchmarks/all.py --quick --out $(BENCH_DIR) $(ARGS)

reproduce: setup  ## run an experiment to its row in docs/results.md (EXPERIMENT=; none lists them)
	@exec $(BIN)/python scripts/reproduce.py $(EXPERIMENT) $(ARGS)

clean:  ## remove caches and builds, keep .venv
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	@find rllib_dreamer tests tuned_examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
