# Every target but `clean` works in a fresh clone: it makes .venv if there is none and installs when setup.cfg changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
TABLE ?= families.md
# Of each kind of fault, and the first of their seeds.
ROUNDS ?= 10
SEED ?= 0

CASES ?= 1000

.PHONY: demo test slow test-faults nightly-faults soak fuzz families lint lock format docs clean

demo: $(VENV)/.installed
	$(BIN)/python -m flexgen_helm.run $(ARGS)

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

slow: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(ARGS)

test-faults: $(VENV)/.installed
	HF_HUB_OFFLINE=1 FAULT_ROUNDS=$(ROUNDS) FAULT_SEED=$(SEED) $(BIN)/python -m pytest -m faults -n 0 $(ARGS)

nightly-faults:
	$(MAKE) test-faults ROUNDS=50 SEED=$$(date +%Y%m%d)00

soak: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.soak $(ARGS)

# CASES at each door, 1000 by default; `make fuzz CASES=100000 ARGS='--doors policies tokenizers'`.
fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]' || echo "no atheris here: cases are made at random"
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests/engine:tests/flexgen_helm $(BIN)/python tests/fuzz --cases $(CASES) $(ARGS)

families: $(VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/engine/count_families.py $(TABLE)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet -e '.[test,dev,fuzz]'
	$(VENV)-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable > $(VENV)-lock/frozen
	(grep '^#' constraints.txt; sed -n 's/^\([^ =]*==[^ +]*\).*/\1/p' $(VENV)-lock/frozen) > constraints.new
	mv constraints.new constraints.txt
	rm -rf $(VENV)-lock

format: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

$(VENV)/.installed-docs: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
