# What a developer runs. Everything happens in .venv, made with PYTHON (3.11 or newer).
PYTHON ?= python3
BACKEND ?= sqlite
PYTEST_ARGS ?=
# Ten processes, though there are fewer cores: most tests wait for servers and leases.
PARALLEL := -n 10

RUN := .venv/bin/python
ENVIRONMENT := .venv/.made-from-pyproject

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-containers verify lint format format-check types imports bench chaos peers clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# Tests start hundreds of processes, and each would compile all modules where none are kept.
test test-full test-containers verify: export PYTHONDONTWRITEBYTECODE =
# A server of tests lives for minutes: Java's second compiler takes longer than it saves.
test test-full verify: export JDK_JAVA_OPTIONS = -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
# On a machine that is busy or slow all takes several times as long.
test test-full: export QTASKS_CONFORMANCE_PATIENCE = 90

demo: $(ENVIRONMENT) ## a worker and an API on the embedded default, asked over HTTP
	$(RUN) -m examples.demo

test: $(ENVIRONMENT) ## all tests except the long ones; starts the servers, installs them if needed
	$(RUN) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-full: $(ENVIRONMENT) ## all tests, also the long ones
	$(RUN) -m pytest --full $(PARALLEL) $(PYTEST_ARGS)

test-containers: $(ENVIRONMENT) ## tests of the four servers, each server in a container
	$(RUN) -m tests.containers $(PARALLEL) $(PYTEST_ARGS)

verify: $(ENVIRONMENT) ## tests of the kit and of the test servers, if those have changed
	$(RUN) -m tests.unchanged

lint: $(ENVIRONMENT) ## run ruff
	$(RUN) -m ruff check .

format: $(ENVIRONMENT) ## format every file
	$(RUN) -m ruff format .

format-check: $(ENVIRONMENT) ## check the format
	$(RUN) -m ruff format --check .

types: $(ENVIRONMENT) ## run mypy in strict mode
	$(RUN) -m mypy

imports: $(ENVIRONMENT) ## check the import contracts
	.venv/bin/lint-imports

bench: $(ENVIRONMENT) ## throughput of BACKEND (sqlite), beside its bare driver
	$(RUN) -m benchmarks.throughput --backend $(BACKEND)

chaos: $(ENVIRONMENT) ## tasks on eight pairs while workers and servers are killed and frozen
	$(RUN) -m benchmarks.chaos --all --tasks 20000

peers: ## rates beside other task queues on BACKEND, redis or postgres
	test -d .venv/peers || $(PYTHON) -m venv .venv/peers
	.venv/peers/bin/pip install --quiet --requirement benchmarks/peers/requirements.txt '.[all]'
	.venv/peers/bin/python -m benchmarks.peers --backend $(BACKEND)

clean: ## remove the environment
	rm -rf .venv

$(ENVIRONMENT): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "QTasks needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[dev]'
	@touch $@
