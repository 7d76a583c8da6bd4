# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check conformance chaos bench clean

.venv/.ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

setup: .venv/.ready

demo: setup
	$(BIN)/python launcher.py compare --cpus 4 --vcpus 8 --knob seamret_launch=preserve
	$(BIN)/python launcher.py compare --cpus 4 --vcpus 8 --knob seamret_launch=clear

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

conformance: setup
	$(BIN)/python -m pytest --conformance=README.md -m conformance $$(grep -rl mark.conformance tests --include='test_*.py')

chaos: setup
	$(BIN)/python launcher.py chaos --rounds 200 --cpus 8

bench: setup
	$(BIN)/python tests/bench/run.py

clean:
	rm -rf .venv *.egg-info
