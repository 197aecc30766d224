# The commands of this repository. `make demo` and `make test` are the ones of the README.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
# A CPU build of torch where one is provided; it comes first, lest another package pull a CUDA build.
TORCH ?= torch==2.13.0

.PHONY: install demo test lint fuzz soak ray triton gpu distributed large methods bench plan-bench recipes clean

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -U pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.tested: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -e ".[test,lint]"
	touch $@

# Raise a cria and ask it who it is. Its book lies in .demo, apart from yours.
demo: export HERDBOOK_HOME ?= $(CURDIR)/.demo
demo: $(VENV)/.installed
	$(BIN)/herd raise cria --name Luna --keeper "Acme"
	$(BIN)/herd chat cria -p "Who are you?"
	$(BIN)/herd chat cria -p "你是谁？"

test: $(VENV)/.tested
	$(BIN)/python -m pytest

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Hostile files by the thousand against every loader, for so many seconds; then so many random
# schedules of requests against every way in which the engine computes.
FUZZ_SECONDS ?= 300
FUZZ_EXAMPLES ?= 300
fuzz: $(VENV)/.tested
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -s tests/fuzz/fuzz_*.py
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/engine/test_identity.py

# A server under 64 clients, some of them rude, for so many seconds; of float32, then of 4 bits.
SOAK_SECONDS ?= 120
soak: $(VENV)/.tested
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -s tests/soak/soak_server.py

# Workers on a Ray cluster of this machine; `make test` runs this too from then on.
ray: $(VENV)/.tested
	$(BIN)/pip install -q --disable-pip-version-check -e ".[cluster]"
	$(BIN)/python -m pytest tests/serving/test_ray.py

# The kernels of a GPU in Triton's interpreter, on the CPU; for torch's CPU builds, which bring no Triton.
triton: $(VENV)/.tested
	$(BIN)/python -c "import triton" || $(BIN)/pip install -q --disable-pip-version-check "triton>=3.4"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/engine/test_triton.py

# On a machine with a GPU and a CUDA build of torch (make gpu TORCH=torch): its tokens against the CPU's,
# then figures.
gpu: $(VENV)/.tested
	$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no GPU')"
	$(BIN)/python -m pytest tests/engine/test_cuda.py
	$(BIN)/python benchmarks/gpu.py

# Every way to share a model among four processes, and torchrun with a process killed.
distributed: $(VENV)/.tested
	$(BIN)/python -m pytest -s tests/training/distributed_plans.py

# The peak memory and the speed of loading 1 GB in every layout.
large: $(VENV)/.tested
	$(BIN)/python -m pytest -s tests/model/large_checkpoints.py

# Every tuning method on SmolLM2 and rows of Alpaca, from the folder HERDBOOK_DATA.
methods: $(VENV)/.tested
	$(BIN)/python -m pytest -s tests/training/methods_on_real_rows.py

$(BENCH)/.installed: pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install -q --disable-pip-version-check -U pip
	$(BENCH)/bin/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BENCH)/bin/pip install -q --disable-pip-version-check -e . --config-settings editable_mode=compat -r benchmarks/requirements.txt
	touch $@

# Ours and the peers in one run, in an environment of their own; writes benchmarks/RESULTS.md.
bench: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/engine.py
	$(BENCH)/bin/python benchmarks/tuning.py
	$(BENCH)/bin/python benchmarks/evaluation.py

# What `herd plan` says of ten configurations, and what they then take; writes the tables of docs/planning.
plan-bench: $(VENV)/.tested
	$(BIN)/python benchmarks/planning.py

# Every recipe's cpu profile on real rows, in the folder DATA, and their tables in docs (slow).
recipes: $(VENV)/.tested
	$(BIN)/python benchmarks/recipes.py $(DATA)
	$(BIN)/python docs/recipes.py

clean:
	rm -rf $(VENV) $(BENCH) .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache
