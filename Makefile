# Everything from a fresh clone: `make study` and `make test` do all the set-up that they need.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STUDY ?= first

.PHONY: help setup study test test-all repro ui report lint clean cheats
help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

setup: $(VENV)/installed   ## virtual environment with the locked versions

study: setup     ## a small study on the embedded corpus: baseline and 6 trials, about 10 minutes on 2 cores
	$(RUN)/nightshift study study.name=$(STUDY)

test: setup      ## the tests: about 3 minutes on 2 cores, no GPU, no network
	$(RUN)/python -m pytest

test-all: setup  ## with the slow ones, and those that need a GPU where there is one
	$(RUN)/python -m pytest -m "not gpu or gpu"

cheats: setup    ## commit every known cheat, guarded and not, and every honest change: about 10 minutes
	$(RUN)/python tests/cheats/run.py

repro: setup     ## train and evaluate what conf/ says, through DVC
	PATH="$(CURDIR)/$(RUN):$$PATH" dvc repro

ui: setup        ## the MLflow UI on this checkout's runs
	$(RUN)/nightshift ui

report: setup    ## chart, table and summary of a study: make report STUDY=first
	$(RUN)/nightshift report $(STUDY)

lint: setup
	$(RUN)/ruff check . && $(RUN)/ruff format --check .

clean:           ## removes the environment and caches; keeps outputs/ and data/
	rm -rf $(VENV) .cache .pytest_cache

# torch first and by itself: its build depends on the machine, everything else does not.
$(VENV)/installed: requirements.lock pyproject.toml install.sh
	PYTHON="$(PYTHON)" sh install.sh $(VENV)
	@touch $@
