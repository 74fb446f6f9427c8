# The commands of a fresh machine: Python 3.10 or newer, a C++ compiler and make are all they need.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed

.PHONY: help demo test lint clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

demo: $(INSTALLED) ## train the small RaftMLP on real digits, evaluate it, draw its predictions (into runs/digits)
	$(RUN) tools/train.py --config configs/digits/raftmlp_digits.yaml --overwrite
	$(RUN) tools/validate.py --model raftmlp_digits --checkpoint runs/digits/model_best.pth.tar --dataset digits \
		--picture runs/digits/predictions.png --results-file runs/digits/validation.json

test: $(INSTALLED) ## run all tests
	$(RUN) -m pytest

lint: $(INSTALLED) ## check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean: ## remove what the other commands made, the environment too
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "raftmlp needs Python 3.10 or newer: name one with make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "this Python cannot make environments: install its venv package (python3-venv on Debian)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --constraint constraints.txt --editable '.[test]'
	@touch $@
