# CI runs the same targets as people. They need Python >= 3.11, cargo and make. All other packages go into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The wheels of onnxruntime for CPU and GPU overwrite each other, so exactly one is installed.
RUNTIME ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
RUST_SOURCES := $(shell find rust_router/src -name '*.rs') rust_router/Cargo.toml Cargo.toml

.DEFAULT_GOAL := help
.PHONY: help install demo test test-rust test-python lint bench wheels clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Make .venv and install both distributions with the development tools

$(INSTALLED): pyproject.toml export/pyproject.toml $(RUST_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python >= 3.11 is needed, $$($(PYTHON) --version) was found; run make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v cargo >/dev/null || { echo "error: cargo is needed to build the Rust module; install it from rustup.rs" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -e '.[autoattack,hub,reports]' -e './export[$(RUNTIME),export,serve]' --group dev
	@touch $@

demo: $(INSTALLED) ## Train, evaluate, export and run a small MoE-CNN on embedded images
	$(BIN)/python examples/demo.py

test: test-rust test-python ## Run the Rust and the Python tests

test-rust: $(INSTALLED)
	cargo test --quiet -p rust_router

test-python: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(INSTALLED) ## Check style, types and warnings: ruff, mypy, spelling, imports, shapes, clippy, rustfmt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python tools/import_order.py
	$(BIN)/python tools/shapes.py
	cargo clippy --quiet --workspace --all-targets --all-features -- -D warnings
	cargo fmt --check

# The benchmark of attacks compares with torchattacks. --no-deps ignores its pins of old libraries, which the
# benchmark does not need.
bench: $(INSTALLED) ## Run the benchmarks; each prints one JSON object
	$(BIN)/python -m pip install --quiet --no-deps 'torchattacks>=3.5'
	@for script in benchmarks/*.py; do echo "# $$script"; $(BIN)/python $$script --json || exit 1; done

wheels: $(INSTALLED) ## Build a wheel of each distribution into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . ./export

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) target dist advmoe/rust_router.abi3.so
