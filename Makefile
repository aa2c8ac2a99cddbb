# `make`       installs into .venv, and compiles an example to a package that runs
# `make test`  checks everything: lint, types, tests

VENV ?= .venv
BIN := $(VENV)/bin
# `python3` if it is new enough, else whichever is. One that is there may still not start, or lack venv.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

.PHONY: demo install test clean print-python

demo: install
	$(BIN)/python examples/classifier/model.py
	$(BIN)/optc compile examples/classifier/spec.yaml -o build/classifier
	$(BIN)/optc verify build/classifier

install: $(VENV)/installed

# tensorrt-stubs asks for TensorRT itself, which mypy does not need and PyPI does not have.
$(VENV)/installed: pyproject.toml
	$(if $(PYTHON),,$(error optc needs Python 3.11 or newer, with its venv module: set PYTHON to it))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[rtx,dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'tensorrt-stubs==10.13.*'
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/tensorrt_stubs.py build/stubs
	$(BIN)/mypy
	$(BIN)/python -m pytest

print-python:
	@echo $(PYTHON)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
