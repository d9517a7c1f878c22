# `make demo` and `make test` work on a fresh machine with Python 3.11 or later; everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: help demo test test-slow quality format wheel clean

help:
	@echo "make demo       the whole story on drawn slides, ending in $(OUT)/report.html (OUT=DIR to choose)"
	@echo "make test       the tests, some minutes"
	@echo "make test-slow  the tests that take longer"
	@echo "make quality    lint and formatting"
	@echo "make format     mend the formatting"
	@echo "make wheel      build the wheel into dist/"

demo: $(VENV)/installed
	$(BIN)/hf-pathology demo --out $(OUT)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m slow

quality: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/installed-test
	$(BIN)/python -m build --wheel --installer uv

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/installed: setup.cfg pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e .
	@touch $@

$(VENV)/installed-test: setup.cfg pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[test]'
	@touch $@ $(VENV)/installed
