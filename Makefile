# Two commands do everything: `make quickstart` and `make test`. Each makes its own environment.
PYTHON ?= python3
PY := .venv/bin/python
# Real time on two CPU cores without base weights; the published recipe is in the README.
TINY := --vit_name vit_tiny --ckpt none --img_size 224 --batch_size 8 --n_gpu 1 --warmup --AdamW

.PHONY: help install quickstart test lint clean

help:
	@echo "make quickstart  phantom CT -> preprocess -> train -> test -> pictures, in quickstart/"
	@echo "make test        linter and all tests"
	@echo "make install     only the environment, in .venv/"
	@echo "make clean       remove quickstart/ and .venv/"

install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; run make with PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: .venv/installed
	rm -rf quickstart/runs
	$(PY) -m preprocess.phantom --output quickstart/raw --cases 24
	$(PY) -m preprocess.prepare --input quickstart/raw --output quickstart/data
	$(PY) train.py --root_path quickstart/data --output quickstart/runs $(TINY) --base_lr 6e-4
	$(PY) test.py --config quickstart/runs/*/config.json --volume_path quickstart/data \
		--output_dir quickstart/result --is_savenii

test: lint
	$(PY) -m pytest

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf quickstart .venv
