# Everything sets itself up: `.venv` is made, and filled from PyPI, where it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-lowest lint format clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/installed  ## fine-tune vitresnet_nano on photographs of solar cells, a few minutes on 2 cores
	$(BIN)/python benchmarks/elpv.py --output demo

test: .venv/installed lint  ## lint, types and the default suite
	$(BIN)/python -m pytest -m 'not slow'

test-slow: .venv/installed  ## what takes long
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-lowest:  ## the suite on exactly the oldest versions that pyproject.toml allows (downloads gigabytes)
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable '.[test]' --constraint tests/lowest.txt
	.venv-lowest/bin/python -m pytest -m 'not slow' --ignore tests/test_downstream.py  # whose programs want newer ones

clean:
	rm -rf .venv .venv-lowest demo dist
