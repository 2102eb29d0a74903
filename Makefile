# Every target sets .venv up first (once). `make help` lists the targets.
PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
MIN := $(shell sed -n 's/^min_python *= *//p' settings.ini)
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup book site test colab lab bench fix hooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

setup: $(READY)  ## install the library and its tools into .venv, at the versions of constraints.txt

$(READY): settings.ini setup.py pyproject.toml constraints.txt tests/requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python $(MIN) or newer, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; need = tuple(map(int, "$(MIN)".split("."))); \
	sys.exit(0 if sys.version_info >= need else f"Diffusion Book needs Python $(MIN) or newer, and $(PYTHON) is \
	{sys.version.split()[0]}. Name a newer one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Installing the library and its tools into .venv: about 2 GB, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/requirements.txt
	@touch $@

book: $(READY)  ## run every chapter here at preset quick and render _book/index.html
	$(BIN)/python tools/book.py build

site: $(READY)  ## render the published edition from the committed outputs, nothing executed
	$(BIN)/python tools/book.py site

test: $(READY)  ## lint, types, export in step, then every test, notebook and page (WORKERS=2 at once)
	@sh tools/ensure_browser.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_export.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

colab: $(READY)  ## every chapter with the front end that Colab has, installed by its set-up cell
	COLAB_CHAPTERS=all $(BIN)/python -m pytest tests/test_colab.py $(PYTEST_ARGS)

lab: $(READY)  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab nbs

bench: $(READY)  ## our training step and sampler beside those of two other packages; leave the machine alone meanwhile
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/peers.py $(BENCH_ARGS)

fix: $(READY)  ## write headers, format, export the modules and clean the notebooks
	$(BIN)/python tools/chapter_header.py --write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

hooks: $(READY)  ## install the notebook merge driver and the commit hooks in this clone
	git config merge.nbdev-merge.name "merge notebooks cell by cell"
	git config merge.nbdev-merge.driver "$(BIN)/nbdev-merge %O %A %B %P"
	$(BIN)/pre-commit install

clean:  ## remove what was built, keep .venv
	rm -rf _book _build _site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
