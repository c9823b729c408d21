# `make demo` and `make test` are each one command on a fresh machine: both set up first.
# PYTHON picks the interpreter that makes .venv; FLAGS are added to `openvision3 demo`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test check format test-slow bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "openvision3 needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (first and alone) ..."
	$(PIP) install torch==2.13.0 -c constraints.txt
	@echo "installing openvision3 and its tools ..."
	$(PIP) install -q -e '.[dev]' -c constraints.txt
	@touch $@

demo: setup
	$(BIN)/openvision3 demo $(FLAGS)

test: check

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist loadfile

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/vae_speed.py
	$(BIN)/python benchmarks/step_speed.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scale.py
	@test -n "$(SHARDS)" || echo "make bench SHARDS='data/*.tar' times the reader and the latent cache, too; pixel_share.py trains for an hour"
	test -z "$(SHARDS)" || $(BIN)/python benchmarks/data_speed.py $(SHARDS)
	test -z "$(SHARDS)" || $(BIN)/python benchmarks/latents_speed.py $(SHARDS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
