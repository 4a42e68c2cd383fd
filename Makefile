# Two commands: `make serve` starts the server with the built-in demo model, `make test` runs every check and test.
#
#   PYTHON=python3.12   which Python makes the environment in .venv (3.11 to 3.13)
#   TORCH_INDEX=URL     where pip also looks for PyTorch, such as https://download.pytorch.org/whl/cpu
#   ARGS="--port 8000"  more for the command that is run

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help serve bench test check lint fmt proto docs docs-reference screenshots clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

serve: .venv/.installed  ## Start the server with the demo model (or ARGS="MODEL --flags")
	@exec $(BIN)/foveate serve $(ARGS)

bench: .venv/.installed  ## Start a server, measure it, stop it
	@exec $(BIN)/foveate bench serve $(ARGS)

test: lint  ## Every check and every test
	$(BIN)/python -m pytest $(ARGS)

check: test  ## The same

lint: .venv/.installed-dev  ## The quick checks: style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: .venv/.installed-dev  ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: .venv/.installed-dev  ## Compile vision.proto
	$(BIN)/python -m grpc_tools.protoc -I. --descriptor_set_out=foveate/vision/vision.protoset --pyi_out=. \
		foveate/vision/vision.proto

# Not with --quiet: what is not printed would not be counted as a warning.
docs: .venv/.installed-docs  ## Build the documentation's site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "$(BIN)/python -m http.server --directory site 8080 shows it on http://127.0.0.1:8080"

docs-reference: .venv/.installed  ## Make those pages of docs/ that are made from the code
	$(BIN)/python -m foveate.deploy.reference > docs/configuration.md
	$(BIN)/python -m foveate.api.metrics_reference > docs/metrics.md
	$(BIN)/python -m foveate.api.reference > docs/api.md
	$(BIN)/python -m foveate.checkpoint.cards > docs/real-model.md

screenshots: .venv/.installed-dev  ## Make the pictures of the web chat (needs chromium and Chinese fonts)
	PYTHONPATH=tests:. $(BIN)/python tests/ui/screenshots.py

clean:  ## Remove the environment and all caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build site *.egg-info

# The stamps are younger than pyproject.toml as long as what it asks for is installed.
.venv/.installed: pyproject.toml | .venv/bin/python
	@[ -n "$(TORCH_INDEX)" ] || [ -e /dev/nvidiactl ] || \
		echo "Without an NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu makes the download far smaller."
	$(PIP) install $(INDEX) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) install $(INDEX) --editable '.[dev]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) install $(INDEX) --editable '.[docs]'
	@touch $@

.venv/bin/python:
	@command -v "$(PYTHON)" > /dev/null || \
		{ echo "error: $(PYTHON) is not there: install Python 3.11, 3.12 or 3.13, or name it with PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$("$(PYTHON)" --version 2>&1);" \
		"name another one with PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "error: $(PYTHON) cannot make environments; on Debian: apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
