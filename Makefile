# make demo, make test: the two commands; they set up .venv themselves. make check: ruff and mypy. make slow: long tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check slow clean
demo: .venv/runtime
	$(BIN)/python -m compress run slim_resnet18_digits

test: .venv/development
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests

slow: .venv/development
	$(BIN)/python -m pytest -q -m slow tests

check: .venv/development
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/development: requirements-dev.txt $(wildcard requirements/*.txt) .venv/runtime
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@
