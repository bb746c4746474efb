# make demo   set up, train a small CMFS, score it, export fused images   (DATA=path for real pairs)
# make test   set up, run the tests
# make lint   set up, check style
PYTHON ?= python3
BIN := .venv/bin
DATA ?=

.PHONY: demo test lint clean

demo: .venv/.runtime
	$(BIN)/python tools/demo.py $(if $(DATA),--data "$(DATA)")

test: .venv/.development
	$(BIN)/python -m pytest

lint: .venv/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or later is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/.runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/.development: requirements-dev.txt .venv/.runtime
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
