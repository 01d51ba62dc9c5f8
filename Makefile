# Everything runs in .venv, made on first use; `make clean` removes it.
ON_WINDOWS := $(filter Windows_NT,$(OS))
PYTHON ?= $(if $(ON_WINDOWS),python,python3)
VENV := .venv
VENV_PYTHON := $(VENV)/$(if $(ON_WINDOWS),Scripts,bin)/python
RUN := $(VENV_PYTHON) -m

.PHONY: demo full long test alone check style types fast torture real policy notebooks site \
  repository help clean

demo: $(VENV)/ready  ## train GRPO and IAPO on the embedded policy, compare them, three seeds (about six minutes)
	$(RUN) iapo_mini compare --preset demo

full: $(VENV)/ready  ## the same with five seeds (what the README reports)
	$(RUN) iapo_mini compare --preset full

check: $(VENV)/ready  ## style, types and the fast tests: under ninety seconds on two cores
	$(MAKE) style
	$(MAKE) --jobs 2 types fast

style: $(VENV)/ready  ## ruff: faults and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/ready  ## mypy
	$(RUN) mypy

FAST := structure config question rollouts advantages objective intervals metrics tasks stories \
  strides reading rewards flat attention diagnose exact datasets
fast: $(VENV)/ready  ## the tests that take seconds
	$(RUN) pytest -q $(FAST:%=tests/test_%.py)

test: $(VENV)/ready  ## style, types and every test, the notebooks included
	$(MAKE) style types
	$(RUN) pytest -n auto --dist loadfile
	$(MAKE) alone

ALONE := build/alone
alone: $(VENV)/ready  ## every notebook as on Colab: from the wheel, with no repository beside it
	rm -rf build/lib $(ALONE)
	$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(ALONE)/dist .
	$(RUN) pip install --quiet --no-deps --target $(ALONE)/site $(ALONE)/dist/*.whl
	cp -r notebooks/*.ipynb notebooks/solutions notebooks/nbval.cfg $(ALONE)
	cd $(ALONE) && HF_HUB_OFFLINE=1 PYTHONPATH="$$PWD/site" ../../$(RUN) pytest -n auto --dist loadfile \
	  --nbval --nbval-current-env --nbval-sanitize-with nbval.cfg *.ipynb solutions

torture: $(VENV)/ready  ## kills, full disks and hostile input: a few minutes
	$(RUN) pytest tests/torture

real: $(VENV)/ready  ## a pretrained model, end to end: make real MODEL=folder-or-hub-id
	@test -n "$(MODEL)" || { echo "make real wants MODEL=..., a model folder or a hub id"; exit 2; }
	HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-0} IAPO_REAL_MODEL="$(MODEL)" \
	  $(RUN) pytest tests/real -rA --durations=0

long: $(VENV)/ready  ## three seeds, 60 steps
	$(RUN) iapo_mini compare --preset long

policy: $(VENV)/ready  ## remake the embedded policy and its report into runs/
	$(RUN) iapo_mini.lab.pretrain --out runs/pretrain

notebooks: $(VENV)/ready  ## run the notebooks and keep their outputs
	$(RUN) jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb notebooks/solutions/*.ipynb

site: $(VENV)/ready  ## the site in build/site: documents, course as committed, API, explorer
	$(RUN) pip install --quiet --editable '.[site]'
	$(VENV_PYTHON) site/build.py

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --requirement requirements.txt
	touch $@

repository:  ## write another address of the repository wherever it stands: OWNER=... NAME=...
	$(PYTHON) .ci/repository.py "$(OWNER)" "$(NAME)"

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

clean:  ## remove the virtual environment and what was built
	rm -rf $(VENV) build *.egg-info
