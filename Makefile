# Everything a developer does, by name. `make` alone lists it.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROUNDS ?= 10

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.PHONY: venv
venv: $(BIN)/python ## make .venv with halfbyte and everything to develop it (several GB: torch)
	$(BIN)/pip install '.[dev]'

.PHONY: build
build: ## rebuild the native module in place, after a change in rust/
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin develop --release

.PHONY: test
test: ## run the Python tests (those that need a GPU run where there is one)
	$(BIN)/pytest

.PHONY: gpu-test
gpu-test: ## run the Python tests that need a GPU, their failures in .build/gpu-failures.txt
	PYTHON=$(BIN)/python tests/run_gpu.sh

.PHONY: soak
soak: ## run every test that draws at random ROUNDS times (10), each time with other draws
	for round in $$(seq $(ROUNDS)); do \
		cargo test --workspace --quiet && $(BIN)/pytest -q -m hypothesis --hypothesis-seed=random && \
		$(BIN)/pytest -q tests/test_bitsandbytes_live.py tests/test_cli_checkpoint.py || exit 1; \
	done

.PHONY: test-rust
test-rust: ## run the Rust tests, with and without CUDA support
	cargo test --workspace
	cargo test -p halfbyte --no-default-features

.PHONY: lint
lint: ## check format, lints and types, change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

.PHONY: fmt
fmt: ## format everything
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt --all

.PHONY: ptx
ptx: ## recompile the CUDA kernels to PTX (the compiler comes from PyPI, no toolkit needed)
	$(BIN)/python cuda/build.py

.PHONY: demo
demo: ## quantize the little model in tests/ and compare
	$(BIN)/halfbyte demo tests/models/pycode-llama-7m

.PHONY: bench
bench: ## measure every operation beside torch and bitsandbytes, the quick way
	$(BIN)/halfbyte bench --quick

.PHONY: figures
figures: ## rewrite README's figures from benches/results
	$(BIN)/python benches/table.py

.PHONY: ci
ci: ## what CI runs, from nothing
	.ci/run

.PHONY: clean
clean: ## delete what was built (not .venv)
	rm -rf target dist .build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python -name '*.so' -delete
