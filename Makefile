# Each target does its own set-up: nothing is needed but Python >= 3.10, make and git.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2

.PHONY: demo test lint types docs check bench clean

# Threads that sleep while they wait: spinning ones slow training down several times when the machine is busy.
demo: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/lagless demo --out demo-run --overwrite

# One thread per worker: the workers are the parallelism, and spinning threads would only wait for each other.
# A file's tests go to one worker, which makes what they share once; the order of files leaves short ones for the end.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

check: test lint types docs

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/product.py
	$(BIN)/python benchmarks/trainer.py
	$(BIN)/python benchmarks/pace.py
	$(BIN)/python benchmarks/bias_correction.py

# Editable install, so only a change of dependencies needs another run of pip.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) site demo-run
