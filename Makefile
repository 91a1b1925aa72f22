# make demo: set up, train on the embedded lyrics, generate.  make test: set up for development, test.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-long gpu-check docs-check notebooks install install-dev lint clean

demo: install
	$(BIN)/python data/darklyrics/prepare.py
	$(BIN)/python train.py config/train_darklyrics.py
	$(BIN)/python sample.py --out_dir=out-darklyrics

test: install-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-long: install-dev
	$(BIN)/python -m pytest -q -m long

gpu-check:  # installs nothing; make gpu-check ARGS=--device=cpu
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu_check.py $(ARGS)

docs-check: install-dev  # runs every block of every page (minutes); make test runs the quick ones
	$(BIN)/python tests/docs_check.py

notebooks: install-dev
	$(BIN)/python notebooks/run.py

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: .venv/installed
install-dev: .venv/installed-dev

# The editable install adds the command .venv/bin/lyregpt.
.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache lyregpt.egg-info
	rm -rf __pycache__ */__pycache__ data/*/__pycache__
