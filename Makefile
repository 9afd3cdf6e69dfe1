# Each target sets up what it needs, once: .venv is made anew when the packages asked for change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
VERL := .venv-verl/.ready

.PHONY: demo ppo verl test test-slow test-oldest test-examples test-faults test-verl test-gpu soak lint types \
	check docs bench bench-ppo bench-scale bench-gpu bench-weights \
	bench-verl chart clean

demo: $(READY)
	$(BIN)/python examples/colocated_actor_critic.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# Whole programs, and processes that are made to fail.
test-slow: $(READY)
	$(BIN)/python -m pytest -m 'slow and not long' $(ARGS)

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -m 'not long' -o filterwarnings=default $(ARGS)

# Trains for minutes: that the examples learn, in every way to place and cut them.
test-examples: $(READY)
	$(BIN)/python -m pytest tests/examples -m 'long and not verl' -o timeout=300 $(ARGS)

# veRL's own PPO trainer on veRL's core and on this one: every metric, and the seconds per step.
verl: $(VERL)
	PYTHONPATH=. $(VERL:.ready=bin/python) -W ignore -m examples.verl $(ARGS)

# The same as a test, and each name that veRL takes from its core.
test-verl: $(READY) $(VERL)
	$(BIN)/python -m pytest -m verl $(ARGS)

# Every fault that there is to survive, on clusters of their own.
test-faults: $(READY)
	$(BIN)/python -m pytest tests/faults -m 'slow or long' -o timeout=300 $(ARGS)

# On a machine with CUDA devices; tests for two cards are skipped where there is one.
test-gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu -m gpu -o timeout=300 -s $(ARGS)

soak: $(READY)
	PYTHONPATH=. $(BIN)/python -m tests.faults.soak $(ARGS)

ppo: $(READY)
	$(BIN)/python -m examples.ppo $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: test test-slow lint types

# Fails on a broken link, a broken reference, and on Python in a page that does not run as it says.
docs: .venv/.docs
	$(BIN)/sphinx-build -W --keep-going -q -d build/doctrees docs build/docs
	$(BIN)/python docs/run_snippets.py README.md docs/*.md

bench: $(READY)
	$(BIN)/python benchmarks/data_proto.py $(ARGS)
	$(BIN)/python benchmarks/data_plane.py $(ARGS)

bench-ppo: $(READY)
	PYTHONPATH=. $(BIN)/python benchmarks/ppo.py $(ARGS)

# What a driver does for up to 4,096 ranks, without their processes; ARGS="--processes 4 24": with.
bench-scale: $(READY)
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench-verl: $(READY) $(VERL)
	$(BIN)/python benchmarks/data_proto.py --verl-python $(VERL:.ready=bin/python) $(ARGS)
	$(BIN)/python benchmarks/data_plane.py --verl-python $(VERL:.ready=bin/python) $(ARGS)

bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# Between CPUs, and between the cards that there are.
bench-weights: $(READY)
	$(BIN)/python benchmarks/weights.py $(ARGS)

chart: $(READY) $(VERL)
	$(BIN)/python benchmarks/data_plane.py --json docs/data_plane.json --chart docs/data_plane.png

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

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The original, with what its trainer needs on a CPU of all that it asks for.
$(VERL): examples/verl/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		verl==0.9.1 TransferQueue==0.1.10
	touch $@
