# Everything that people and CI run. `make demo` and `make test` set up what they need, on a machine with Python ≥ 3.11.
#
# The install is editable: src/toque holds links to workers/, storage/ and chaos/, so one folder is the whole package and
# each module has one file and one name. The wheel does not need the links: see the package list in pyproject.toml.

VENV ?= .venv
BIN := $(VENV)/bin
BASE ?= python:3.12-slim
NATS_IMAGE ?= nats:2.15
SEED ?= 1
SEEDS ?= 500
JOBS ?= 2
MINUTES ?= 10
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; \
	done)
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit real beside sim fmt dist local-images test-containers bench chaos soak clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 26

demo: $(VENV)/.installed  ## run the main job: a census on two pods, one of them killed half-way
	$(BIN)/toque demo

test: lint unit  ## lint, strict types and all tests but those that need containers
	$(MAKE) -j2 real beside

lint: $(VENV)/.developing
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: $(VENV)/.developing
	$(BIN)/mypy

unit: $(VENV)/.developing
	$(BIN)/pytest -n auto tests/unit tests/simulation

real: $(VENV)/.developing
	$(BIN)/pytest -m 'not containers' tests/integration tests/acceptance  # one by one: they share the machine's disk

beside: $(VENV)/.developing  # what only computes gives way to the tests that mostly wait, and fills the time
	nice -n 15 $(MAKE) types sim JOBS=1

sim: $(VENV)/.developing  ## play SEEDS=500 seeds in the simulator
	$(BIN)/python -m toque.sim sweep --seeds 1-$(SEEDS) --jobs $(JOBS)

fmt: $(VENV)/.developing  ## sort imports and mend what ruff can mend
	$(BIN)/ruff check --fix

dist: $(VENV)/.developing  ## build sdist and wheel, and run the wheel in an environment of its own
	rm -rf dist build
	$(BIN)/python -m build -q
	rm -rf build/check && $(PYTHON) -m venv build/check
	wheel=$$(ls dist/*.whl) && build/check/bin/python -m pip --disable-pip-version-check -q install "$$wheel[cli,server]"
	cd build/check && bin/toque version && bin/python -P -m toque worker --help >/dev/null
	@ls -l dist

local-images: $(VENV)/.developing  ## images for test-containers out of this machine's own parts (root, debootstrap)
	PYTHON=$(BIN)/python bash tests/acceptance/local_images.sh

test-containers: export NATS_IMAGE := $(NATS_IMAGE)
test-containers: $(VENV)/.developing  ## the tests that need a Docker engine (BASE, NATS_IMAGE: other images)
	docker build $(BUILD_OPTIONS) --build-arg BASE=$(BASE) -t toque-worker .
	$(BIN)/pytest -m containers

bench: $(VENV)/.developing  ## throughput and latency on this machine
	$(BIN)/python bench/throughput.py

chaos: $(VENV)/.installed  ## run every chaos scenario once, and judge it (SEED=1; pages in chaos-reports/)
	$(BIN)/toque chaos run all --seed $(SEED) --report chaos-reports

soak: $(VENV)/.installed  ## work with faults for MINUTES=10, and see whether anything grows (SEED=1)
	$(BIN)/toque chaos soak --minutes $(MINUTES) --seed $(SEED) --report chaos-reports

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 with venv and pip found; install one (Debian, Ubuntu:" \
		"apt-get install python3-venv), or name it: make PYTHON=/path/to/python3.13" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --upgrade 'pip>=25.1'  # the first that knows --group
	$(PIP) install -e '.[cli,server,nkeys]'
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(PIP) install --group dev
	@touch $@
