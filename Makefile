# Everything works from a fresh clone: what needs .venv makes it first (scripts/install.sh).
.DEFAULT_GOAL := help
.PHONY: help install quickstart simulate bench study soak doctor docs test test-all check docker docker-check clean

PYTHON_BIN := .venv/bin/python
# DeepSpeed and torch look for ninja on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help:  ## What there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## Make .venv with everything in it; does nothing the second time
	@bash scripts/install.sh

quickstart: install  ## Train a tiny model on Countdown, without a GPU; ARGS="train.steps=20" adds keys
	@$(PYTHON_BIN) -m dpsrl.train +recipe=quickstart $(ARGS)

simulate: install  ## Compare the selection methods on simulated prompts, in a minute; ARGS="worlds=hard seeds=10"
	@$(PYTHON_BIN) -m dpsrl.simulate $(ARGS)

bench: install  ## Selection, full steps beside TRL, large data: a quarter of an hour; ARGS="short data" for parts
	@$(PYTHON_BIN) scripts/bench.py $(ARGS)

study: install  ## What selection brings, by many real runs: hours; study=smoke for minutes, ARGS="seeds=2" for less
	@$(PYTHON_BIN) -m dpsrl.study $(if $(study),study=$(study)) $(ARGS)

soak: install  ## Hundreds of steps with random faults; ARGS="100" for fewer
	@$(PYTHON_BIN) scripts/faults.py soak $(ARGS)

doctor:  ## What this machine has and lacks, with the remedies; ARGS="+recipe=math" for another recipe
	@if [ -x $(PYTHON_BIN) ]; then $(PYTHON_BIN) -m dpsrl.doctor $(ARGS); else python3 -m dpsrl.doctor $(ARGS); fi

docs: install  ## The guide as a web site, in build/site
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(PYTHON_BIN) -m mkdocs build --quiet

test: install  ## Unit and integration tests, files spread over up to four cores; ARGS="-k name" goes to pytest
	@$(PYTHON_BIN) -m pytest -n auto --maxprocesses 4 -m "not slow" $(ARGS)

test-all: install  ## The slow tests too: hours on two cores; ARGS="-k name" goes to pytest
	@$(PYTHON_BIN) -m pytest $(ARGS)

check: install  ## Lint, format, types and the quick unit tests: about a minute
	@$(PYTHON_BIN) -m ruff check .
	@$(PYTHON_BIN) -m ruff format --check .
	@$(PYTHON_BIN) -m mypy
	@$(PYTHON_BIN) -m pytest -q -n auto -m "not slow and not process" tests/unit $(ARGS)

docker:  ## Build the image dpsrl:cpu, or with GPU=1 dpsrl:gpu; ARGS="--build-arg PIP_INDEX_URL=..." goes to docker
	docker build --file docker/Dockerfile --build-arg DPSRL_EXTRA=$(if $(GPU),gpu,cpu) --tag dpsrl:$(if $(GPU),gpu,cpu) $(ARGS) .

docker-check: install  ## Build the CPU image without Docker and train in it, as root: half an hour; GPU=1 for the other image
	@DPSRL_EXTRA=$(if $(GPU),gpu,cpu) $(PYTHON_BIN) scripts/check_image.py $(ARGS)

clean:  ## Remove caches and build outputs; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find dpsrl tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
