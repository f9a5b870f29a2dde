# Two commands from a clean clone; each makes its own virtual environment in .venv, with the versions in constraints.txt.
#
#   make test    all tests (those marked `gpu` are skipped without a GPU)
#   make bench   compile every kernel, then check and time a few shapes against what this machine has
#
# make PYTHON=python3.12 test     another interpreter        make test ARGS="-k mask -x"       more arguments

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: test bench lint api clean

test: $(INSTALLED)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(ARGS)

bench: $(INSTALLED)
	$(BIN)/flashcore bench --plot $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .

# The pages of docs/api, from the docstrings.
api: $(INSTALLED)
	$(BIN)/python tools/api_pages.py

clean:
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench,cu13]'
	touch $@
