# make demo   set up and run the main job on embedded data
# make test   set up and run all tests
# make lint   ruff and pyright
# make bench  the head-to-head timings (long; results in benchmarks/results)

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
INSTALL = if command -v uv >/dev/null 2>&1; \
	then uv pip install --quiet --python $(BIN)/python -c constraints.txt $(1); \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(1); fi
DEMO_OUT ?= runs/demo
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test fast lint bench clean notebooks

demo: $(VENV)/core
	$(BIN)/permjax run --out $(DEMO_OUT) --force

test: $(VENV)/dev
	$(PYTEST) -m "not slow"

fast: $(VENV)/dev
	$(PYTEST) -m fast

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/dev
	$(BIN)/python benchmarks/weight_matching.py
	$(BIN)/python benchmarks/assignment.py
	$(BIN)/python benchmarks/frank_wolfe.py
	$(BIN)/python benchmarks/matching.py
	$(BIN)/python benchmarks/pleas.py
	$(BIN)/python benchmarks/lora_merge.py
	$(BIN)/python benchmarks/kge.py
	$(BIN)/python benchmarks/spt.py

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "permjax needs Python 3.11 or newer on the PATH (or PYTHON=/path/to/python)."; exit 1; }
	@if command -v uv >/dev/null 2>&1; then uv venv --quiet --python "$(PYTHON)" $(VENV); else "$(PYTHON)" -m venv $(VENV); fi

$(VENV)/core: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing permjax into $(VENV) (a few minutes the first time) ..."
	@$(call INSTALL,-e .)
	@touch $@

$(VENV)/dev: $(VENV)/core
	@$(call INSTALL,-e '.[dev]')
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest runs build dist .pytest_cache .ruff_cache

# execute the notebooks and write them with their outputs
notebooks: $(VENV)/dev
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-execute --inplace notebooks/*.ipynb
