# Everything runs in .venv, which is made on first use; `make clean` removes it.
ON_WINDOWS := $(filter Windows_NT,$(OS))
PYTHON ?= $(if $(ON_WINDOWS),python,python3)
VENV := .venv
VENV_PYTHON := $(VENV)/$(if $(ON_WINDOWS),Scripts,bin)/python
RUN := $(VENV_PYTHON) -m

.PHONY: demo full long test alone check style types fast torture real policy notebooks site slides \
  repository help clean

demo: $(VENV)/ready  ## train GRPO and IAPO on the embedded policy and compare them, with three seeds (under ten minutes)
	$(RUN) iapo_mini compare --preset demo

full: $(VENV)/ready  ## the same with five seeds, for the results in the README
	$(RUN) iapo_mini compare --preset full

check: $(VENV)/ready  ## check style and types, and run the fast tests (under ninety seconds on two cores)
	$(MAKE) style
	$(MAKE) --jobs 2 types fast

style: $(VENV)/ready  ## check faults and format with ruff
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/ready  ## check types with mypy
	$(RUN) mypy

FAST := structure config question rollouts advantages objective intervals metrics tasks stories \
  strides reading rewards flat attention diagnose exact datasets
fast: $(VENV)/ready  ## run the tests that take only seconds
	$(RUN) pytest -q $(FAST:%=tests/test_%.py)

test: $(VENV)/ready  ## check style and types, and run every test and notebook
	$(MAKE) style types
	$(RUN) pytest -n auto --dist loadfile
	$(MAKE) alone

ALONE := build/alone
alone: $(VENV)/ready  ## run every notebook from the wheel without the repository, as on Colab
	rm -rf build/lib $(ALONE)
	$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(ALONE)/dist .
	$(RUN) pip install --quiet --no-deps --target $(ALONE)/site $(ALONE)/dist/*.whl
	cp -r notebooks/*.ipynb notebooks/solutions notebooks/nbval.cfg $(ALONE)
	cd $(ALONE) && HF_HUB_OFFLINE=1 PYTHONPATH="$$PWD/site" ../../$(RUN) pytest -n auto --dist loadfile \
	  --nbval --nbval-current-env --nbval-sanitize-with nbval.cfg *.ipynb solutions

torture: $(VENV)/ready  ## test with kills, full disks and hostile input (a few minutes)
	$(RUN) pytest tests/torture

real: $(VENV)/ready  ## test with a pretrained model, end to end: make real MODEL=folder-or-hub-id
	@test -n "$(MODEL)" || { echo "make real needs MODEL=..., a model folder or a hub id"; exit 2; }
	HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-0} IAPO_REAL_MODEL="$(MODEL)" \
	  $(RUN) pytest tests/real -rA --durations=0

long: $(VENV)/ready  ## the same comparison with three seeds and 60 steps
	$(RUN) iapo_mini compare --preset long

policy: $(VENV)/ready  ## remake the embedded policy and its report in runs/
	$(RUN) iapo_mini.lab.pretrain --out runs/pretrain

notebooks: $(VENV)/ready  ## run the notebooks and keep their outputs
	$(RUN) jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb notebooks/solutions/*.ipynb

site: $(VENV)/ready  ## build the site in build/site: documents, committed course, API, explorer
	$(RUN) pip install --quiet --editable '.[site]'
	$(VENV_PYTHON) site/build.py

slides: $(VENV)/ready  ## make slides of two sessions from the notebooks, in build/slides
	$(VENV_PYTHON) site/slides.py

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --requirement requirements.txt
	touch $@

repository:  ## change the address of the repository everywhere: OWNER=... NAME=...
	$(PYTHON) .ci/repository.py "$(OWNER)" "$(NAME)"

help:  ## print this list
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

clean:  ## remove the virtual environment and what was built
	rm -rf $(VENV) build *.egg-info
