# Everything sets itself up: `.venv` is made, and filled from PyPI, where it is missing or older than pyproject.toml.
PYTHON ?= python3
# processes of the suite
JOBS ?= 2
BIN := .venv/bin

.PHONY: help demo demo-dense test test-one test-slow test-vithybrid test-lowest lint format clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 18

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/installed  ## fine-tune vitresnet_mix_nano on photographs of solar cells, some ten minutes on 2 cores
	$(BIN)/python benchmarks/elpv.py --output demo

demo-dense: .venv/installed  ## train a U-Net and a DPT on vitresnet_base to find handwriting on photographs, minutes on 2 cores
	$(BIN)/python benchmarks/dense.py --output demo-dense

test: .venv/installed lint  ## lint, types and the default suite (half an hour on 2 slow cores)
	# a thread for each process, set before it starts: with another number of threads the last bits are others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n $(JOBS) --dist worksteal --durations 30

test-one: .venv/installed  ## one file or test of the suite: make test-one T=tests/models/test_backbone.py::test_levels
	$(BIN)/python -m pytest $(or $(T),$(error T: not given, expected a file of tests or one of its tests))

# the last transformers with ViTHybrid that runs on this torch
.venv-vithybrid/installed: Makefile
	test -x .venv-vithybrid/bin/python || $(PYTHON) -m venv .venv-vithybrid
	.venv-vithybrid/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 transformers==4.40.2 \
		tokenizers==0.19.1 huggingface_hub==0.36.2 safetensors numpy pillow
	touch $@

test-slow: .venv/installed .venv-vithybrid/installed  ## the tests that take long (downloads gigabytes)
	$(BIN)/python -m pytest -m slow

test-vithybrid: .venv/installed .venv-vithybrid/installed  ## our loader against transformers 4.40.2 (downloads gigabytes)
	$(BIN)/python -m pytest -m slow tests/test_vithybrid.py

lint: .venv/installed  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/installed  ## let ruff format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-lowest:  ## the suite on the oldest versions that pyproject.toml allows (downloads gigabytes)
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable '.[test]' --constraint tests/lowest.txt
	.venv-lowest/bin/python -m pytest -m 'not slow and not recent' --ignore tests/test_downstream.py  # whose programs are newer

clean:  ## remove the environments and what the demos made
	rm -rf .venv .venv-lowest .venv-vithybrid demo demo-dense dist
