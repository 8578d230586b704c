# Every target does the set-up it needs; `make help` lists them.
# A command-line PYTHON=... chooses another interpreter for a new .venv. Names that work but fail (version-manager shims) are passed over.
CHECK_PYTHON := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON = $(shell for p in .venv/bin/python python3.11 python3.12 python3.13 python3 python; do \
	if $$p -c '$(CHECK_PYTHON)' >/dev/null 2>&1; then echo $$p; break; fi; done)
PY := .venv/bin/python
# Two tests at a time with one thread each: twice as fast as one with two on a small model. The tests of a file stay together.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
PARALLEL := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# Set by module systems of clusters; they would put other packages before those of .venv.
unexport PYTHONPATH PYTHONHOME
# MODEL=path-or-hub-name reaches the demo through the environment; ARGS="--field value ..." are more of its settings.
export MODEL

.DEFAULT_GOAL := help
.PHONY: help setup fmt check docs pages test-fast test test-full test-gpu bench-gpu demo demo-tiny

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup:  ## create .venv with what this machine can use (seconds if nothing changed)
	@python='$(PYTHON)'; if [ -z "$$python" ]; then \
	echo 'setup: no Python 3.11 to 3.13 with venv on PATH; install one (Debian, Ubuntu: apt install python3 python3-venv)' >&2; exit 1; fi; \
	"$$python" .ci/setup.py

fmt: setup  ## format and sort imports
	@$(PY) -m ruff check --fix-only -q . && $(PY) -m ruff format .

check: setup  ## ruff, types, layers
	$(PY) -m ruff check --no-cache .
	$(PY) -m ruff format --check --no-cache .
	$(PY) -m mypy
	$(PYTEST) -q tests/test_layout.py -m "not slow"

test-fast: setup  ## under a minute: no server, no processes that are killed
	$(PYTEST) $(PARALLEL) -m "not slow and not server and not process and not gpu"

test: setup  ## about ten minutes: one vLLM server on a tiny model
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu"

test-full: check  ## what `make test` leaves out: checks and slow tests
	$(PYTEST) $(PARALLEL) -m "slow and not gpu"

test-gpu: setup  ## tests that need an NVIDIA GPU
	$(PYTEST) -m gpu tests/test_gpu.py

bench-gpu: setup  ## at most ten minutes of one H100 or H200, after the GPU's tests: benchmarks/gpu.json
	$(PY) -m marlora.recipes.cli.main bench gpu --size qwen3-4b --repeats 5 --json benchmarks/gpu.json

pages: setup  ## write the pages that come from the code and the numbers: results, methods, settings, reference, metrics, llms.txt
	@for page in results_tables method_pages settings_page reference_pages metrics_page llms_page; do $(PY) -m tests.$$page || exit 1; done

docs: setup  ## build the documentation site into build/site; a broken link ends it
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict && echo "docs: build/site/index.html; with the search: python3 -m http.server -d build/site"

demo: setup  ## train and evaluate a team of two on a real model (MODEL=... for another), into runs/demo
	@$(PY) -m marlora.recipes.demo --output_dir runs/demo --overwrite true $${MODEL:+--model "$$MODEL"} $(ARGS)

demo-tiny: setup  ## the same with GRPO on a tiny model: a minute, no server
	@$(PY) -m marlora.recipes.grpo_team --output_dir runs/demo-tiny --overwrite true $(ARGS)
