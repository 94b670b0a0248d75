# Everything sets itself up: `.venv` is made, and filled from PyPI, where it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-vithybrid test-lowest lint format clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/installed  ## fine-tune vitresnet_nano on photographs of solar cells, a few minutes on 2 cores
	$(BIN)/python benchmarks/elpv.py --output demo

test: .venv/installed lint  ## lint, types and the default suite
	$(BIN)/python -m pytest -m 'not slow'

# the last transformers with ViTHybrid that runs on this torch
.venv-vithybrid/installed: Makefile
	test -x .venv-vithybrid/bin/python || $(PYTHON) -m venv .venv-vithybrid
	.venv-vithybrid/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 transformers==4.40.2 \
		tokenizers==0.19.1 huggingface_hub==0.36.2 safetensors numpy pillow
	touch $@

test-slow: .venv/installed .venv-vithybrid/installed  ## what takes long
	$(BIN)/python -m pytest -m slow

test-vithybrid: .venv/installed .venv-vithybrid/installed  ## our loader against transformers 4.40.2 (downloads gigabytes)
	$(BIN)/python -m pytest -m slow tests/test_vithybrid.py

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
	.venv-lowest/bin/python -m pytest -m 'not slow and not recent' --ignore tests/test_downstream.py  # whose programs are newer

clean:
	rm -rf .venv .venv-lowest .venv-vithybrid demo dist
