# make demo and make test set up what they need. On Linux MLX runs on the CPU here (BACKEND=cuda12 or cuda13 for a GPU).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKEND ?= cpu
comma := ,
EXTRAS := dev$(if $(filter Linux,$(shell uname -s)),$(comma)$(BACKEND))
PIP := install --quiet --disable-pip-version-check
TORCH := .venv-torch
DATA ?= $(MLX_XFORMER_DATA)
# Tests are shared by as many processes as there are cores, at most four; planted bugs start processes of their own.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
PLAIN := not torch and not real and not browser

.PHONY: demo test test-nightly test-torch test-browser test-real check format dist bench bench-peers clean

demo: $(VENV)/installed
	$(BIN)/mlx-xformer separate mlx_xformer/data/demo.flac -n htdemucs_mini

# Without planted bugs and without what takes long, which make check runs.
test: $(VENV)/installed
	$(PYTEST) -m "$(PLAIN) and not slow and not mutants"

# The property tests of caches, with new examples; about a quarter of an hour.
test-nightly: $(VENV)/installed
	MLX_XFORMER_EXAMPLES=10000 $(PYTEST) tests/nn/test_cache_properties.py

# PyTorch and the original packages live in an environment of their own and run in a process of their own.
test-torch: $(VENV)/installed $(TORCH)/installed
	MLX_XFORMER_TORCH_PYTHON=$(CURDIR)/$(TORCH)/bin/python $(PYTEST) -m torch

# Chromium and its driver open the report page (Debian: chromium chromium-driver).
test-browser: $(VENV)/installed
	$(PYTEST) -n 0 -m browser

# MLX_XFORMER_DATA names the folder of checkpoints and recordings that may not be shipped.
test-real: $(VENV)/installed-real
	MLX_XFORMER_DATA="$(DATA)" $(PYTEST) -m real

check: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/mypy -p mlx_xformer
	$(BIN)/lint-imports --no-logo
	$(PYTEST) -m "$(PLAIN) and not mutants"
	$(PYTEST) -n 0 -m mutants

format: $(VENV)/installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# The source distribution and the wheel, built in an environment of their own from the source distribution.
dist: $(VENV)/installed
	$(BIN)/pip $(PIP) "build>=1.3" "twine>=6"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: $(VENV)/installed
	$(BIN)/python bench/run.py

bench-peers: $(VENV)/installed
	$(BIN)/python bench/run.py --peers

clean:
	rm -rf $(VENV) $(TORCH) .bench build *.egg-info

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip $(PIP) -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/installed-real: $(VENV)/installed tests/requirements-real.txt
	$(BIN)/pip $(PIP) --no-deps -r tests/requirements-real.txt
	@touch $@

$(TORCH)/installed: tests/oracle/requirements.txt
	$(PYTHON) -m venv --clear $(TORCH)
	$(TORCH)/bin/pip $(PIP) torch==2.13.0
	$(TORCH)/bin/pip $(PIP) --no-deps -r tests/oracle/requirements.txt
	@touch $@
