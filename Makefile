# make finetune   a virtual environment, edgejax, and a real fine-tuning run on this machine
# make test       lint, types and all tests          make doctor   check this installation
# make lint       lint and types only                make clean    remove what these made (never runs/)
# make gpu-aot    XLA's compiler for NVIDIA's cards, which `edgejax plan --device rtx3060` needs (575 MB, no GPU needed)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
DATA ?= python-reference
STEPS ?= 32
FINETUNE_FLAGS ?= --seq 512 --batch 1 --rank 8 --steps $(STEPS) --learning-rate 5e-4
PYTEST_FLAGS ?= -n 2

.PHONY: finetune test lint doctor gpu-aot clean

finetune: $(VENV)/.installed
	$(BIN)/edgejax finetune --model $(MODEL) --data $(DATA) $(FINETUNE_FLAGS)

test: $(VENV)/.installed-test lint
	$(BIN)/pytest $(PYTEST_FLAGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

doctor: $(VENV)/.installed
	$(BIN)/edgejax doctor

gpu-aot: $(VENV)/.installed
	@$(BIN)/python -c 'import edgejax.plan.card as card; card.find_plugin()' 2>/dev/null || \
		PATH="$(abspath $(BIN)):$$PATH" sh -c "$$($(BIN)/python -c 'import edgejax.plan.card as card; print(card.install_command())')"

clean:
	rm -rf $(VENV) build dist edgejax.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgejax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing edgejax into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
