# Every target makes .venv by itself when it is missing. Only Python 3.11 or newer and make are needed.
PYTHON ?= python3
BIN := .venv/bin
PRESET ?= quick
ANALYSIS_CASES ?= 6
ARM_STEPS ?= 150
FINE := outputs/reference/fine

.PHONY: run test lab bench check reproduce

run: .venv/installed ## all numbered notebooks at PRESET, and outputs/<run>/report.html
	$(BIN)/python -m physnb run --preset $(PRESET) -p analysis_cases=$(ANALYSIS_CASES) -p train_steps=$(ARM_STEPS)

test: .venv/extras ## lint, tests, and the notebooks at their defaults
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/check.sh

lab: .venv/installed ## JupyterLab at the first notebook
	$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/00_start_here.ipynb

bench: .venv/installed ## simulator and training step against what one would use instead
	$(BIN)/python -m physnb bench sim
	$(BIN)/python -m physnb bench train

reproduce: .venv/extras ## the study of notebook 08 again: do its tables lie within the committed intervals? --resume inside
	$(BIN)/python -m physnb study --model $(FINE)/model --weaker $(FINE)/earlier --weaker $(FINE)/small \
	  --twin $(FINE)/twin --out outputs/reproduce --resume --against outputs/reference/study --executor ray

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
