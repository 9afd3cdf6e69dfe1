# Each target sets up what it needs, once: .venv is made anew when the packages asked for change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-oldest lint types check clean

demo: $(READY)
	$(BIN)/python examples/colocated_actor_critic.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -o filterwarnings=default $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: test lint types

clean:
	rm -rf .venv* build *.egg-info

define INSTALL
$(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(filter constraints%,$^) -e '.[dev]'
touch $@
endef

$(READY): pyproject.toml constraints.txt
	$(INSTALL)

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(INSTALL)
