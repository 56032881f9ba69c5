# make demo and make test set everything up by themselves: Python 3.11 or newer and make are all they need.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && { echo $$p; break; }; done || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint quick setup goldens clean

demo: $(READY)
	$(BIN)/qmix demo

test: lint
	$(BIN)/python -m pytest

quick: $(READY)
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .typecheck/qmix
	ln -sfn $(CURDIR)/qmix/* $(CURDIR)/quantize $(CURDIR)/evals $(CURDIR)/cli.py .typecheck/qmix/
	$(BIN)/mypy -p qmix

setup: $(READY)

# Write the committed golden values anew, each by its oracle in an environment of its own.
goldens:
	for name in 4 5 ct; do \
	  test -x .oracles/$$name/bin/python || $(PYTHON) -m venv .oracles/$$name; \
	  .oracles/$$name/bin/python -m pip install --quiet -e ".[oracle-$$name]" || exit 1; \
	done
	.oracles/4/bin/python tests/golden/make_logits.py
	.oracles/5/bin/python tests/golden/make_logits.py
	.oracles/5/bin/python tests/golden/make_logits.py --compare
	.oracles/ct/bin/python tests/golden/make_compressed.py

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qmix needs Python 3.11 or newer, found %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache demo-out
