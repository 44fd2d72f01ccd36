# Tandem's commands; `make help` lists them. Every one of them makes the environment first.
SHELL := bash
.DEFAULT_GOAL := help
BIN := .venv/bin

# Ranks on this machine.
NPROC ?= 1
# More of the command line: Hydra overrides for grpo, sft and serve, pytest's options for test.
ARGS ?=
# A hub name or a folder. The recipes' default, SmolLM2, has 9 query and 3 key/value heads: it divides over 1 or 3 ranks.
named_in_args = $(filter model=% model.name_or_path=%,$(ARGS))
MODEL ?= $(if $(filter 1 3,$(NPROC))$(named_in_args),,tiny-random/qwen3)

export OMP_NUM_THREADS ?= $(shell n=$$(( $$(nproc) / $(NPROC) )); echo $$(( n > 0 ? n : 1 )))
# Threads that wait sleep instead of spinning: the same speed on an idle machine, many times faster on a busy one.
export OMP_WAIT_POLICY ?= PASSIVE

torchrun = $(BIN)/torchrun --standalone --nproc_per_node=$(NPROC)
overrides = $(if $(MODEL),model.name_or_path=$(MODEL)) $(ARGS)
# Before the ranks start, unless ARGS names another model.
fetch_model = $(if $(named_in_args),:,$(BIN)/python -m framework.models.hub $(MODEL))

.PHONY: help env grpo sft serve doctor test test-all test-gpu faults lint format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: NPROC=2 MODEL=name-or-folder ARGS='key=value ...' HARDWARE=cpu|gpu PYTHON=python3.12"

env: ## the environment, in .venv
	@bash launch/env/setup.sh

grpo: env ## trains the default model with GRPO
	@$(fetch_model)
	$(torchrun) launch/train.py +recipe=grpo $(overrides)

sft: env ## fine-tunes the default model on demonstrations
	@$(fetch_model)
	$(torchrun) launch/train.py +recipe=sft $(overrides)

serve: env ## training and sampling as a service
	@$(fetch_model)
	$(torchrun) launch/serve.py $(overrides)

doctor: env ## what this machine can run, and what is missing
	@$(BIN)/python launch/doctor.py $(ARGS)

test: env ## the tests, two ranks included, without the slow ones
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: env ## every test
	@$(BIN)/python -m pytest $(ARGS)

test-gpu: env ## the tests that need an accelerator
	@$(BIN)/python -m pytest -m gpu $(ARGS)

faults: env ## every fault of docs/reliability.md, whose table it writes
	@$(BIN)/python -m pytest tests/faults --all-faults $(ARGS)

lint: env ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: env ## rewrites the code in the project's style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: env ## newer versions into launch/env/*.lock
	@bash launch/env/lock.sh

clean: ## removes the environment and the caches; runs/ and fetched models stay
	rm -rf .venv .venv.lock .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
