PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-cluster test-accelerator fuzz benchmark clean

$(BIN)/.installed: pyproject.toml requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/cpu.txt
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/robustlens demo

test: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 KMP_BLOCKTIME=0 $(BIN)/pytest -n 2 --dist loadgroup

test-slow: $(BIN)/.installed
	$(BIN)/pytest -m slow

$(BIN)/.cluster: $(BIN)/.installed
	$(BIN)/pip install --quiet --editable '.[test-cluster]'
	touch $@

test-cluster: $(BIN)/.cluster
	OMP_NUM_THREADS=1 KMP_BLOCKTIME=0 $(BIN)/pytest -m cluster tests/cluster

$(BIN)/.accelerator: $(BIN)/.installed
	$(BIN)/pip install --quiet --editable '.[test-accelerator]'
	touch $@

test-accelerator: $(BIN)/.accelerator
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 KMP_BLOCKTIME=0 $(BIN)/pytest -m accelerator tests/accelerator

MINUTES ?= 10

fuzz: $(BIN)/.installed
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

benchmark: $(BIN)/.installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs
