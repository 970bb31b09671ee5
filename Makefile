# `make demo` and `make test` need python3 (3.11 or newer) and nothing else: the first of them fills .venv with the
# versions of constraints-cpu.txt.
# To use an environment of your own instead, with its torch (CUDA, Kaggle, Colab):
#     pip install -c constraints.txt -e '.[dev]' && make demo VENV=none PYTHON=python

PYTHON ?= python3
VENV ?= .venv
# Linux wheels without the CUDA libraries. `make TORCH_INDEX=` takes the default.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

ifeq ($(VENV),none)
PY := $(PYTHON)
RLHF := rlhf
INSTALLED :=
else
PY := $(VENV)/bin/python
RLHF := $(VENV)/bin/rlhf
INSTALLED := $(VENV)/.installed
# the launcher that a stage is started with must be this environment's
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

# One thread a process: several processes that each spin on all cores slow each other down.
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false $(PY) -m pytest

.PHONY: demo demo-full test test-slow gpu-check lint clean

demo: $(INSTALLED)
	$(RLHF) run recipes/demo

demo-full: $(INSTALLED)
	$(PY) benchmarks/demo_full.py

test: $(INSTALLED)
	$(TEST) -n 2 -m "not slow and not gpu"

test-slow: $(INSTALLED)
	$(TEST) -m slow

gpu-check: $(INSTALLED)
	$(PY) benchmarks/gpu_check.py --output benchmarks/results

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints-cpu.txt torch
	$(VENV)/bin/python -m pip install -c constraints-cpu.txt -e '.[dev]'
	touch $@
