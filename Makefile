# Everything runs in .venv, which the first target makes; nothing needs to be activated.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OUT ?= runs/demo
TORCH := $(shell grep -m1 '^torch==' constraints.txt)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo demo-text test lint format clean

help:
	@echo "make demo    graft a pretrained diffusion transformer, end to end; ends with the path of a report"
	@echo "make demo-text  the same for a text-to-image model, on pairs of its own making"
	@echo "make test    run the tests (ARGS='-k plan' goes to pytest)"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite what it can"
	@echo "make setup   only make .venv (PYTHON=python3.12 chooses the interpreter)"

setup: $(STAMP)

# pip first: the one that came with Python may be old, with known flaws. Then torch, by itself, so that a machine's own
# build of it is taken and nothing later replaces it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/graft demo --out $(OUT) --resume

demo-text: $(STAMP)
	$(BIN)/graft demo --text --out $(OUT)-text --resume

# Two processes of one thread each: quicker than one of two, and the same on larger machines. The first to be done takes
# over half of what the other has left.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
