# make demo and make test set everything up by themselves: Python 3.11 or newer and make are all they need.
#
#   make demo     install what qmix needs to run, then quantize the tiny Mixtral and chat with it
#   make test     lint, type-check and run the tests
#   make quick    the tests again, without those marked slow
#   make soak     the long campaigns: fuzzing, hundreds of drawn cases, kernels at many shapes;
#                 SEED=n chooses what is drawn, MINUTES=m ends it
#   make newest   the quick tests beside the newest release of every dependency
#   make aot      every GPU kernel, compiled ahead of time with each Triton that users have, against
#                 what it cost before; AOT=--write records what it costs now
#   make clients  lm-eval and litellm, in an environment of their own, against qmix
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && { echo $$p; break; }; done || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(VENV)/.ready-run
READY  := $(VENV)/.ready
NEWEST := .newest
# One worker a core, each on one thread. `make test PYTEST="-x -k cache"` passes more to pytest.
PYTEST ?=
TESTS  := -m pytest -n auto --maxprocesses 8 --dist worksteal
# Oracles disagree with each other in all but torch, which is the repository's own.
TORCH  := $(shell sed -n 's/^\(torch<[0-9.]*\).*/\1/p' constraints.txt)
SEED   ?= 0
MINUTES ?=
# Of torch 2.11, 2.13 and 2.15. Each lies in a folder of its own
# and hides the one of the environment.
TRITONS := 3.6.0 3.7.1 3.9.0
AOT    ?=
PIP    := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint quick soak newest aot clients setup goldens rivals llama clean

demo: $(RUN)
	$(BIN)/qmix demo

test: lint
	$(BIN)/python $(TESTS) $(PYTEST)

quick: $(READY)
	$(BIN)/python $(TESTS) -m "not slow and not soak" $(PYTEST)

soak: $(READY)
	SOAK_SEED=$(SEED) SOAK_MINUTES=$(MINUTES) $(BIN)/python $(TESTS) -m soak --hypothesis-profile soak --hypothesis-seed $(SEED) $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .typecheck/qmix
	ln -sfn $(CURDIR)/qmix/* $(CURDIR)/quantize $(CURDIR)/evals $(CURDIR)/cli.py .typecheck/qmix/
	$(BIN)/mypy -p qmix

setup: $(READY)

# No constraints: what a user gets who installs today, and on Linux torch for CUDA, which is several gigabytes.
newest:
	test -x $(NEWEST)/bin/python || for p in python3.13 $(PYTHON); do \
	  $$p -c "" 2>/dev/null && exec $$p -m venv $(NEWEST); done
	$(NEWEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager -e ".[test]"
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check | grep -iE "^(torch|triton|numpy|safetensors|sentencepiece|typer|rich|transformers|bitsandbytes) "
	$(NEWEST)/bin/python $(TESTS) -m "not slow and not soak" $(PYTEST)

aot: $(READY) $(TRITONS:%=.aot/%/.ready)
	for version in $(TRITONS); do \
	  PYTHONPATH=.aot/$$version $(BIN)/python -W error::UserWarning -m qmix.evals.aot $(AOT) || exit $$?; \
	done

.aot/%/.ready: | $(READY)
	$(BIN)/python $(PIP) --no-deps --target .aot/$* triton==$*
	touch $@

# Write the committed golden values anew, each by its oracle in an environment of its own.
goldens: .oracles/38/.ready .oracles/4/.ready .oracles/5/.ready .oracles/ct/.ready .oracles/modelopt/.ready .oracles/hqq/.ready .oracles/auto-round/.ready .oracles/mlx/.ready .oracles/gguf/.ready .oracles/peft/.ready .oracles/gptqmodel/.packed
	for name in 38 4 5; do for file in logits page; do \
	  .oracles/$$name/bin/python tests/golden/make_$$file.py || exit 1; \
	done; done
	.oracles/5/bin/python tests/golden/make_logits.py --compare
	.oracles/5/bin/python tests/golden/make_fp8.py
	.oracles/ct/bin/python tests/golden/make_compressed.py
	.oracles/ct/bin/python tests/golden/make_compressed_floats.py
	.oracles/modelopt/bin/python tests/golden/make_modelopt.py
	.oracles/gguf/bin/python tests/golden/make_gguf.py
	.oracles/peft/bin/python tests/golden/make_peft.py
	.oracles/hqq/bin/python tests/golden/make_hqq.py
	.oracles/hqq/bin/python tests/golden/make_hqq.py mixtral
	.oracles/mlx/bin/python tests/golden/make_mlx.py
	.oracles/auto-round/bin/python tests/golden/make_auto_round.py
	.oracles/gptqmodel/bin/python tests/golden/make_gptqmodel.py

# What gptqmodel makes of the tiny model at its defaults and at its best, scored as ours is.
RIVALS := .oracles/rivals
rivals: $(READY) .oracles/gptqmodel/.packed
	mkdir -p $(RIVALS)
	for part in train heldout; do $(BIN)/python -m qmix.evals.corpus $$part > $(RIVALS)/$$part.txt || exit 1; done
	for group in 128 32; do for variant in ':' '-act-mse:, "desc_act": true, "mse": 2.4' \
	  '-act-static-mse:, "desc_act": true, "static_groups": true, "mse": 2.4'; do \
	  out=$(RIVALS)/gptqmodel-g$$group$${variant%%:*}; more=$${variant#*:}; rm -rf $$out; \
	  .oracles/gptqmodel/bin/python tests/golden/make_gptqmodel.py evals/tiny $(RIVALS)/train.txt $$out \
	    "{\"group_size\": $$group$$more}" > $$out.log 2>&1 || { tail $$out.log; exit 1; }; \
	  $(BIN)/qmix eval $$out --data $(RIVALS)/heldout.txt --reference evals/tiny --dtype float32 || exit 1; \
	done; done

# What llama.cpp's quantizers make of the tiny model, scored beside `auto`.
llama: $(READY) .oracles/gguf/.ready
	$(BIN)/python -m qmix.evals.accuracy --llama .oracles/gguf/bin/python --only 'auto*'

clients: .oracles/clients/.ready
	.oracles/clients/bin/python -m pytest tests/evals/harness tests/serving/http/test_lm_eval_client.py tests/serving/http/test_litellm_client.py $(PYTEST)

.oracles/%/.ready: pyproject.toml
	test -x .oracles/$*/bin/python || $(PYTHON) -m venv .oracles/$*
	.oracles/$*/bin/python -m pip install --quiet -e ".[oracle-$*]" "$(TORCH)"
	touch $@

# pyproject.toml says why these two come without what they ask for.
.oracles/gptqmodel/.packed: .oracles/gptqmodel/.ready
	.oracles/gptqmodel/bin/python -m pip install --quiet --no-deps gptqmodel==7.7.0 auto-gptq==0.7.1
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qmix needs Python 3.11 or newer, found %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) -c constraints.txt -e .
	touch $@

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) -c constraints.txt -e ".[test]"
	touch $(RUN) $@

clean:
	rm -rf $(VENV) $(NEWEST) .aot .typecheck .mypy_cache .ruff_cache .pytest_cache demo-out
