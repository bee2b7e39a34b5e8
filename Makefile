# The two commands of the README are `make serve` and `make test`; each installs what it needs.
# PIP_ARGS goes to pip, for instance to name PyTorch's index of CPU wheels.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
PIP_ARGS ?=
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: serve test test-all setup lint fix native sanitize mini tables measure bench bench-quick screenshots clean

serve: $(VENV)/.serve
	$(BIN)/qnext serve --host $(HOST) --port $(PORT)

# The tests of one file stay together only as far as balance allows; each worker computes on one core.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Everything, the long tests included.
test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m ""

setup: $(VENV)/.dev

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Rebuilds the native kernels after a change in csrc (make setup builds them the first time).
native: $(VENV)/.dev
	$(INSTALL) --no-deps -e .

# The tests of the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer. The libraries
# are preloaded because Python itself is built without them; leaks of the interpreter are not ours.
CXX ?= g++
PRELOAD = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
sanitize: $(VENV)/.dev
	$(INSTALL) --no-deps -e . -C cmake.define.QNEXT_SANITIZE=ON -C build-dir=build/sanitize
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(PRELOAD)" $(BIN)/python -m pytest tests/native; \
	  found=$$?; $(INSTALL) --no-deps -e . && exit $$found

# Trains the embedded model again, from the corpora in DATA: about two hours (recipes/qnext_mini.py).
DATA ?= ../shared/data
MINI_WORK = .data/qnext-mini
RUN = runs/qnext-mini
MINI = src/qnext/models/qnext-mini
mini: $(VENV)/.dev
	$(BIN)/qnext data tokenizer --recipe recipes/qnext_mini.py --data $(DATA) --policy +cdla --vocab-size 6144 --out $(MINI_WORK)/tokenizer
	$(BIN)/qnext data prepare --recipe recipes/qnext_mini.py --data $(DATA) --policy +cdla --tokenizer $(MINI_WORK)/tokenizer --out $(MINI_WORK)/data
	$(BIN)/qnext train recipes/qnext_mini.py --run $(RUN)
	$(BIN)/qnext train export $(RUN) $(MINI_WORK)/exported
	$(BIN)/qnext quantize $(MINI_WORK)/exported $(MINI_WORK)/model --bits 8
	mv $(MINI_WORK)/model/* $(MINI)/
	$(BIN)/qnext train report $(RUN) --out $(MINI)/curves.png
	$(BIN)/qnext eval mini $(MINI) --held-out $(MINI_WORK)/data/held-out --pairs $(DATA)/evals/blimp_100.jsonl.xz --out $(MINI)/evaluation.json --plots $(MINI)
	$(BIN)/python -m recipes.mini.model_card --model $(MINI) --run $(RUN) --data $(MINI_WORK)/data --evaluation $(MINI)/evaluation.json
	$(BIN)/python -m tools.tables

# Writes the tables of README.md from docs/results; `make measure` measures them again first.
tables: $(VENV)/.dev
	$(BIN)/python -m tools.tables

measure: $(VENV)/.dev
	$(BIN)/python -m tools.measure_parity
	$(BIN)/python -m benchmarks.against_transformers
	$(BIN)/python -m tools.tables

# Pictures of the page for the documents; they need a Chromium (.venv/bin/playwright install chromium).
screenshots: $(VENV)/.dev
	$(BIN)/python -m tools.screenshots

# Speed of the native kernels on shape M beside llama.cpp and transformers: docs/benchmarks.md.
# The machine must be idle. WORK takes 45 GB of models (60 while they are made); they are kept.
WORK ?= runs/bench
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.native_speed --work $(WORK) $(if $(AVX2_LLAMA),--avx2-llama $(AVX2_LLAMA))
	$(BIN)/python -m tools.tables

# int4 and one format of llama.cpp in a few minutes; writes to WORK and no table.
bench-quick: $(VENV)/.bench
	$(BIN)/python -m benchmarks.native_speed --quick --work $(WORK)

$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) llama-cpp-python
	@touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || (echo "qnext needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" && false)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing qnext into $(VENV) (first time only) ..."
	$(INSTALL) -e '.[serve,structured]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing qnext and its development tools into $(VENV) (first time only) ..."
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
