# make demo    Neon end to end on embedded real data: scores, plots, report in runs/demo
# make test    the test suite
# make lint    style and types
# make docs    the documentation as a site, in site/ (Python 3.11 or later)
# Each creates .venv and installs what it needs, once. PYTHON names another interpreter (3.10 or later).

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint docs

demo: $(READY)
	$(VENV)/bin/neon demo

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "site/index.html; with its search: $(VENV)/bin/python -m http.server --bind 127.0.0.1 --directory site"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed, $(PYTHON) is older; try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,imm,notebook]'
	touch $@
