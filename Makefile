# `make run` does the whole job on the embedded network and images; `make test` checks everything, a file of tests a core.
# Both create .venv first, on a machine that has nothing but Python 3.11 or newer; a second call installs nothing.

PYTHON ?= python3
ARGS ?=

run: .venv/installed
	.venv/bin/autoprune run $(ARGS)

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autoprune needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch .venv/installed

.PHONY: run test
