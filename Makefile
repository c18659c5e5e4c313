# `make` lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
BENCH_STAMP := $(VENV)/.bench-ready
LMMS := .venv-lmms

.DEFAULT_GOAL := help
.PHONY: help setup demo policy test lint format bench bench-setup lmms-setup proof lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the exact versions of requirements/cpu.txt

$(STAMP): requirements/cpu.txt requirements/setup.sh requirements/fix_torchvision.py pyproject.toml
	@PYTHON=$(PYTHON) VENV=$(VENV) bash requirements/setup.sh
	@touch $@

demo: setup  ## run the whole loop on this machine: answer, judge, tune, compare
	@$(BIN)/sima demo

policy: setup  ## make the demo's policy anew from its seed (about 50 minutes on two idle cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m sima_ray.demo.make_policy

test: bench-setup lmms-setup  ## run every test: unit, cluster, engine (GPU ones where there is a GPU)
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup  ## ruff, pyright, hadolint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/hadolint docker/*.Dockerfile

format: setup  ## ruff's fixes and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: bench-setup  ## the side-by-side benchmarks: policy service, tuning against TRL and the released loop
	@$(BIN)/python -m benchmarks

bench-setup: setup $(BENCH_STAMP)  ## install what the benchmarks compare with (requirements/bench.txt)

$(BENCH_STAMP): requirements/bench.txt $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/bench.txt
	@touch $@

lmms-setup: setup $(LMMS)/ready  ## make .venv-lmms: lmms-eval over .venv (requirements/lmms-eval.txt)

$(LMMS)/ready: requirements/lmms-eval.txt $(STAMP)
	@$(BIN)/python -m sima_ray.runtime.lmms_environment $(LMMS) $<
	@touch $@

proof: setup  ## does self-critique work? the figures of docs/proof.md anew (about 75 minutes on two cores)
	@$(BIN)/python -m benchmarks.proof

lock:  ## resolve requirements/*.txt anew (needs uv)
	@bash requirements/lock.sh

clean:  ## remove .venv, .venv-lmms and caches; runs/ stays
	rm -rf $(VENV) $(LMMS)* .pytest_cache .ruff_cache .hypothesis *.egg-info
