# The README's two commands, quickstart and test, prepare .venv themselves; the daily ones (bench, lint, stubs) install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*/*)

# One pip at a time in one environment.
.NOTPARALLEL:
.PHONY: quickstart test bench lint stubs clean

quickstart: $(VENV)/installed-quickstart
	$(BIN)/gdlib quickstart

test: $(VENV)/installed-test
	$(BIN)/pytest

bench: $(VENV)/installed-bench
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.serving

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The typed face of the compiled module, written anew from the module itself.
stubs: $(VENV)/installed-dev
	$(BIN)/python tests/generate_stubs.py gdlib/_core.pyi

# Only a stamp says that the environment is whole: one that was interrupted, or has no pip, is made anew.
$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gdlib needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip --version
	touch $@

# An editable install: Python files are used where they lie; the kernels are built again when a source of theirs is newer.
$(VENV)/installed-quickstart: EXTRAS := serve,plot
$(VENV)/installed-test: EXTRAS := test
$(VENV)/installed-bench: EXTRAS := bench
$(VENV)/installed-dev: EXTRAS := dev
$(VENV)/installed-%: $(SOURCES) | $(VENV)/created
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist
