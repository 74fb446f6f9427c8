# The commands of a fresh machine: Python 3.10 or newer, a C++ compiler and make are all they need.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install --constraint constraints.txt
RAFTMLP := $(VENV)/bin/raftmlp
INSTALLED := $(VENV)/installed
TESTS := $(VENV)/installed-tests
TOOLBOXES := $(VENV)/installed-mm
DETECTOR := mask_rcnn_raftmlp_digits
SEGMENTOR := fpn_raftmlp_digits

.PHONY: help demo demo-detection demo-segmentation bench gpu scenes test test-core docs lint constraints check-package \
	clean
.NOTPARALLEL: # pip must not install twice at once into one environment

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /:/' | awk -F ':' '{printf "make %-17s %s\n", $$1, $$2}'

demo: $(INSTALLED) ## train the small RaftMLP on real digits, evaluate it, draw its predictions (into runs/digits)
	$(RAFTMLP) train --config digits/raftmlp_digits --epochs 15 --overwrite
	$(RAFTMLP) validate --model raftmlp_digits --checkpoint runs/digits/model_best.pth.tar --dataset digits \
		--picture runs/digits/predictions.png --results-file runs/digits/validation.json

demo-detection: $(TOOLBOXES) scenes ## train a small Mask R-CNN on scenes of digits, evaluate and draw it (mmdet)
	$(RAFTMLP) train-mm configs/detection/$(DETECTOR).py --overwrite
	$(RAFTMLP) eval-mm configs/detection/$(DETECTOR).py runs/$(DETECTOR) --work-dir runs/$(DETECTOR)/test \
		--picture runs/$(DETECTOR)/predictions.jpg --results-file runs/$(DETECTOR)/results.json

demo-segmentation: $(TOOLBOXES) scenes ## train a small Semantic FPN on the same scenes, evaluate and draw it (mmseg)
	$(RAFTMLP) train-mm configs/segmentation/$(SEGMENTOR).py --overwrite
	$(RAFTMLP) eval-mm configs/segmentation/$(SEGMENTOR).py runs/$(SEGMENTOR) --work-dir runs/$(SEGMENTOR)/test \
		--picture runs/$(SEGMENTOR)/predictions.jpg --results-file runs/$(SEGMENTOR)/results.json

bench: $(INSTALLED) ## measure the speed beside the release's operations and other networks (into runs/benchmark)
	$(RAFTMLP) benchmark reference:raftmlp_s raftmlp_s resnet18 convnext_nano --tasks inference training \
		--rounds 5 --output runs/benchmark/models
	$(RAFTMLP) benchmark reference:raftmlp_s raftmlp_s --sizes 224 448 800x1333 1792 --batch-size 1 \
		--rounds 5 --output runs/benchmark/sizes

gpu: ## test and measure on a GPU with the packages of $(PYTHON) (into runs/gpu); DEVICE=cpu rehearses it
	PYTHONPATH=. $(PYTHON) tools/measure_gpu.py $(if $(DEVICE),--device $(DEVICE))

scenes: $(INSTALLED)
	$(RAFTMLP) scenes runs/scenes --train 4000 --val 200

test: $(TESTS) $(TOOLBOXES) ## run all tests; mmdet and mmseg are installed for them
	$(RUN) -m pytest -n 2 --dist worksteal

test-core: $(TESTS) ## run the tests that need neither mmdet nor mmseg
	$(RUN) -m pytest -n 2 --dist worksteal --ignore-glob='tests/test_mm_*'

docs: $(TESTS) ## build the site of the documentation (into build/site); a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: $(TESTS) ## check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

constraints: $(INSTALLED) ## pin what is not pinned yet; UPGRADE=--upgrade renews every pin, see CONTRIBUTING.md
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --universal --python-version 3.10 --extra all --extra mm --output-file constraints.txt \
		--no-annotate --custom-compile-command 'make constraints' --quiet --no-python-downloads $(UPGRADE) pyproject.toml

check-package: $(TESTS) ## build sdist and wheel, try both in new environments of the Pythons at hand (into dist)
	$(RUN) tools/check_package.py

clean: ## remove what the other commands made, the environment too
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "raftmlp needs Python 3.10 or newer: name one with make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "this Python cannot make environments: install its venv package (python3-venv on Debian)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

$(TESTS): $(INSTALLED)
	$(PIP_INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@

$(TOOLBOXES): $(INSTALLED) tools/install_mm.py
	$(RUN) tools/install_mm.py
	@touch $@
