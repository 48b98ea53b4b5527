# make demo    set up, quantize SmolLM2-135M to W4A8, evaluate it, reload it, generate text
# make test    set up, run every test
# make kernels  compile every CUDA kernel for every architecture (minutes; no GPU is needed)
# make check   lint, formatting, types, import order, generated docs
PYTHON ?= python3
VENV ?= .venv
# torch first and pinned: a range would let pip pick another build than the one the figures are from.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
OUT ?= demo-w4a8

.PHONY: demo test kernels check format docs clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(VENV)/ready
	rm -rf $(OUT)
	$(BIN)/zq quantize demo --w4a8 -o $(OUT)
	$(BIN)/zq eval $(OUT) --against demo
	$(BIN)/python tools/reload.py $(OUT) "What is the capital of France?"

test: $(VENV)/ready
	$(BIN)/python -m pytest

kernels: $(VENV)/ready
	$(BIN)/zq kernels build

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/cli_reference.py --check

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/ready
	$(BIN)/python tools/cli_reference.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
