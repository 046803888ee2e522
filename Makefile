# Works with GNU make 3.81, the one macOS ships. Everything lives in .venv and needs only Python.
# PYTHON=/path/to/python3 and EXTRA=cpu|cuda12|cuda13 override what scripts/install.sh chooses.

VENV := .venv
BIN := $(VENV)/bin
MODEL := smollm2-135m
INSTALL := PYTHON="$(PYTHON)" EXTRA="$(EXTRA)" scripts/install.sh
SOURCES := pyproject.toml constraints.txt scripts/install.sh
# Two at a time: each test of a server has an engine at work beside it.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# HOST counts on make's command line only: some shells export the machine's name under it.
SERVE_FLAGS := --model $(MODEL)
ifeq ($(origin HOST),command line)
SERVE_FLAGS += --host $(HOST)
endif
ifneq ($(PORT),)
SERVE_FLAGS += --port $(PORT)
endif

# Tests start hundreds of Python processes: each would compile everything anew where bytecode is
# not kept.
check test soak: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install install-dev serve check test soak bench docs clean
.NOTPARALLEL:

help:
	@echo "make serve    install, then serve $(MODEL) (HOST=, PORT=, MODEL=, ARGS=)"
	@echo "make install  only install, into $(VENV); install-dev: with what tests need"
	@echo "make check    linters, type checks and unit tests"
	@echo "make test     everything that check does, and all other tests"
	@echo "make soak     the long forms of the tests"
	@echo "make bench    compare speeds with mlx-lm (ARGS=)"
	@echo "make docs     the documentation as a site, in build/site"
	@echo "make clean    remove everything that make has created"

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	@$(INSTALL)
	@touch $@

install-dev: $(VENV)/.installed-dev

# The development install holds the plain one.
$(VENV)/.installed-dev: $(SOURCES)
	@$(INSTALL) dev
	@touch $(VENV)/.installed $@

serve: install
	@exec $(BIN)/mlx-server serve $(SERVE_FLAGS) $(ARGS)

# Type checks for both platforms, whichever this is.
define LINT
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/lint-imports --no-logo
printf 'linux\ndarwin\n' | xargs -I{} -P 2 $(BIN)/mypy -p mlx_server -p benchmarks \
	--platform {} --cache-dir .mypy_cache/{}
endef

check: $(VENV)/.installed-dev
	$(LINT)
	$(BIN)/python -m pytest $(PARALLEL) -q tests/unit $(ARGS)

# tests/alone watches the clock, memory or the machine's load, so it runs behind everything else.
test: $(VENV)/.installed-dev
	$(LINT)
	$(BIN)/python -m pytest $(PARALLEL) --ignore=tests/alone $(ARGS)
	$(BIN)/python -m pytest tests/alone $(ARGS)

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m soak --timeout=7200 $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.serving $(ARGS)

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/build_docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info benchmarks/out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find mlx_server benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
