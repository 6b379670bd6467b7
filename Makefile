# Every target runs in $(PY): the project's own .venv, or the interpreter given as PYTHON=.
PYTHON ?=
PY := $(if $(PYTHON),$(PYTHON),.venv/bin/python)
# The Python >= 3.10 that makes .venv.
BASE_PYTHON ?= python3

# What `make test` leaves out; GPU tests skip themselves and say so.
CPU := not slow and not d2_main

.DEFAULT_GOAL := help
.PHONY: help setup test test-fast test-slow test-d2-main lint format type quickstart bench compare-methods

help:  ## list the targets
	@echo "make <target> [PYTHON=/path/to/python]   (default: the project's own .venv)"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup:  ## make .venv, or check the environment given as PYTHON=
	@$(if $(PYTHON),$(PYTHON),$(BASE_PYTHON)) tools/setup_env.py $(if $(PYTHON),--python $(PYTHON))

test: lint type  ## lint, types and every CPU test not marked slow
	$(PY) -m pytest -m "$(CPU)"

test-fast: setup  ## the unit tests
	$(PY) -m pytest tests/unit -m "$(CPU)"

test-slow: setup  ## the tests that take minutes
	$(PY) -m pytest -m "slow and not d2_main"

test-d2-main: setup  ## the official scripts of a Detectron2 main checkout (D2=/path/to/checkout)
	@test -d "$(D2)/tools" || { echo "test-d2-main runs the scripts of a Detectron2 main" \
		"checkout; found none at D2='$(D2)'. Give D2=/path/to/checkout and the" \
		"PYTHON= that has it compiled."; exit 2; }
	D2_CHECKOUT="$(abspath $(D2))" $(PY) -m pytest -m d2_main

lint: setup  ## ruff, rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

type: setup  ## mypy on the package and the benchmarks
	$(PY) -m mypy

quickstart: setup  ## the whole comparison on synthetic data: teacher, student, distilled student
	$(PY) -W ignore -m kd_det quickstart $(ARGS)

bench: setup  ## what distilling costs, short, on the CPU (docs/benchmarks.md says how in full)
	$(PY) -W ignore -m benchmarks $(or $(ARGS),--short)

compare-methods: setup  ## every method on synthetic data, short; ARGS=--full for the real one
	$(PY) -W ignore -m benchmarks.methods $(ARGS)
