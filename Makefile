# make demo   set up, train a small CMFS, score it, export fused images   (DATA=path for real pairs)
# make test   set up, run the tests
# make lint   set up, check style
# make test-oldest   the tests with the lowest versions that requirements.txt allows, in a .venv-oldest
PYTHON ?= python3
BIN := .venv/bin
DATA ?=

.PHONY: demo test test-oldest lint clean

demo: .venv/.runtime
	$(BIN)/python tools/demo.py $(if $(DATA),--data "$(DATA)")

test: .venv/.development
	$(BIN)/python -m pytest

test-oldest: .venv-oldest/.development
	.venv-oldest/bin/python -m pytest

.venv-oldest/.development: requirements.txt requirements-dev.txt tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -r requirements-dev.txt -c tests/oldest.txt
	touch $@

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
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache
