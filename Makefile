# The tasks of this repository; `make` lists them. Every task sets up what it needs and skips what is up to date.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
# The model must work on transformers 5 as well, which the [streaming] extra forbids: an overlay environment holds only
# what differs and takes the rest from $(VENV), which saves a second copy of torch (6 GB).
VENV_TF5 ?= .venv-tf5
RUN := $(VENV)/bin/python -m
RUN_TF5 := $(VENV_TF5)/bin/python -m

.PHONY: help venv venv-tf5 quickstart compare test test-long test-cluster gpu-suite docs lint clean

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## Make the Python environment in .venv (5 to 10 minutes the first time)

$(VENV)/.installed: pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.10 or later, or run: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old; expected Python 3.10 or later: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip
	$(RUN) pip install -e ".[streaming]" # first by itself: given all at once, pip searches for a solution without end
	$(RUN) pip install -e ".[streaming,eval,dev]"
	@touch $@

venv-tf5: $(VENV_TF5)/.installed ## Make the overlay environment with transformers 5 in .venv-tf5

$(VENV_TF5)/.installed: $(VENV)/.installed
	$(RUN) venv --without-pip $(VENV_TF5)
	@base=$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	over=$$($(VENV_TF5)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$base')" > "$$over/base.pth"
	$(RUN_TF5) pip install "transformers>=5,<6"
	@touch $@

quickstart: $(VENV)/.installed ## Train a tiny HIVE through its three stages and show what it learned (4 to 7 minutes on 2 cores)
	$(VENV)/bin/hive-ds quickstart

compare: $(VENV)/.installed ## Train HIVE and its baselines at small scale, 3 seeds each, and judge their encoders alike (35 minutes on 2 cores)
	$(VENV)/bin/hive-ds compare

# tests/conftest.py orders the files: pytest-xdist, which goes by numbers of tests, would keep the longest for the end.
test: $(VENV)/.installed ## Run the tests (9 to 32 minutes on 2 cores)
	$(RUN) pytest -rs --durations=10 -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.installed $(VENV_TF5)/.installed ## Run what is too long for `make test`, and models, kernels, text, export, probes, cost on transformers 5
	$(RUN) pytest -rs -m "long and not gpu and not cluster"
	$(RUN_TF5) pytest -rs tests/model tests/kernels tests/analysis tests/cost tests/planning tests/evaluation/test_export*.py tests/evaluation/test_probes*.py $(addprefix tests/data/test_,$(addsuffix .py,processing data_text data_images data_aspect loader_preprocess loader_text_speed recaption))

test-cluster: $(VENV)/.installed ## Run all tests on a Slurm cluster in namespaces (as root; 25 minutes on 2 busy cores)
	$(RUN) pytest -rs -m cluster --durations=10 tests/cluster

# Needs no environment of ours: on a machine with a GPU and no network, its own Python with torch and triton will do.
# SHAPES=a,b times these alone (kernels/benchmarks/shapes.py lists them), STEP='--arms paper,sa' is handed to a stage's
# command, and SECONDS=170 is time for all of it.
PART ?= checks
SUITE_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))

gpu-suite: ## Check (PART=checks) or time (PART=bench) the kernels, or time a step (PART=stage1|2|3), on a GPU; tiny without one
	@SHAPES="$(SHAPES)" STEP='$(STEP)' HIVE_SUITE_SECONDS="$(SECONDS)" PYTHONPATH="kernels$${PYTHONPATH:+:$$PYTHONPATH}" $(SUITE_PYTHON) -m benchmarks.suite $(PART)

docs: $(VENV)/.installed ## Write the reference and the pictures of docs/ again, from the code
	PYTHONPATH=docs $(RUN) hive_docs

lint: $(VENV)/.installed ## Check style, formatting and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy hive_ds kernels/hive_kernels kernels/benchmarks docs/hive_docs docs/results

clean: ## Remove what the other tasks made (environments, caches, runs)
	rm -rf $(VENV) $(VENV_TF5) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/quickstart
