# Every target makes .venv by itself when it is missing. Only Python 3.11 or newer and make are needed.
PYTHON ?= python3
BIN := .venv/bin
PRESET ?= quick
ANALYSIS_CASES ?= 6
ARM_STEPS ?= 150

.PHONY: run test lab bench check

run: .venv/installed ## all numbered notebooks at PRESET, and outputs/<run>/report.html
	$(BIN)/python -m physnb run --preset $(PRESET) -p analysis_cases=$(ANALYSIS_CASES) -p train_steps=$(ARM_STEPS)

test: .venv/extras ## lint, tests, and the notebooks at their defaults
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/check.sh

lab: .venv/installed ## JupyterLab at the first notebook
	$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/00_start_here.ipynb

bench: .venv/installed ## simulator and training step against what one would use instead
	$(BIN)/python -m physnb bench sim
	$(BIN)/python -m physnb bench train

check: .venv/installed ## lint alone
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/check.sh lint

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "physnb needs Python 3.11 or newer; set PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/extras: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[ray,test]'
	@touch $@
