# `make run`   the whole job on the embedded network and images
# `make test`  lint, types and tests, a file of tests a core
# `make docs`  the pages, into site/
#
# Each creates .venv first and installs what it needs and no more, on a machine that has
# nothing but Python 3.11 or newer. A second call installs nothing.

PYTHON ?= python3
ARGS ?=

run: .venv/run.installed
	.venv/bin/autoprune run $(ARGS)

test: .venv/dev.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

docs: .venv/docs.installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet $(ARGS)

# "run", "dev" and "docs" are extras of pyproject.toml.
.venv/%.installed: pyproject.toml | .venv/bin/python
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autoprune needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

.PHONY: run test docs
.PRECIOUS: .venv/%.installed
