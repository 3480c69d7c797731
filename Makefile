# Every command but `gpu` installs what it needs into .venv/ first.
PYTHON ?= python3
PY := .venv/bin/python
# A small network with every weight trained from scratch: minutes on two CPU cores. This is not the
# published recipe, which is in the README. Without base weights there is nothing to adapt.
TINY := --vit_name vit_tiny --ckpt none --img_size 224 --batch_size 8 --n_gpu 1 --AdamW \
	--base_lr 6e-4 --warmup --warmup_period 100 --clip_grad 0.5 --no_augment \
	--max_epochs 12 --stop_epoch 12

# One worker for every core, each with a single thread of PyTorch.
TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --dist worksteal

# make reproduce RAW=RawData: prepare these scans first; TRAIN=1: train instead of testing adapters.
RAW :=
TRAIN :=
DEVICE := auto
MINUTES := 30

.PHONY: help install quickstart reproduce check test fuzz benchmark gpu lint clean

help:
	@echo "make quickstart  phantom CT -> preprocess -> train -> test -> report, in quickstart/; run"
	@echo "                 it again after an interruption: it goes on"
	@echo "make reproduce   the paper's table from the published adapters and data, or RAW=RawData from"
	@echo "                 the scans, TRAIN=1 by training; says what is to be downloaded, from where"
	@echo "make check       linter, format, order of imports and the fast tests, in some two minutes"
	@echo "make test        linter, format and all tests, also those of the extras: 15 minutes"
	@echo "make fuzz        half an hour of damaged files for every reader; MINUTES=5 for less"
	@echo "make benchmark   time everything against its peers, into docs/benchmarks.md"
	@echo "make gpu         prove on a GPU that results are right and fast: at most nine minutes, and"
	@echo "                 nothing is installed; PYTHON names a Python with PyTorch"
	@echo "make install     only the environment, in .venv/"
	@echo "make clean       remove quickstart/ and .venv/"

install: .venv/installed .venv/installed-viewer

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; run make with PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Extras, so that their tests run too. The package of the viewer has hashes and no dependencies: the
# page only needs the JavaScript in it.
EXTRAS := $(wildcard requirements-onnx.txt requirements-dicom.txt requirements-demo.txt)
VIEWER := $(wildcard requirements-viewer.txt)

.venv/installed-dev: .venv/installed requirements-dev.txt $(EXTRAS) .venv/installed-viewer
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt \
		$(addprefix -r ,$(EXTRAS))
	@touch $@

.venv/installed-viewer: .venv/installed $(VIEWER)
	@test -z "$(VIEWER)" || $(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
		--require-hashes -r $(VIEWER)
	@touch $@

quickstart: .venv/installed-viewer
	@test -f quickstart/phantoms_made || $(PY) -m preprocess.phantom --output quickstart/raw
	@touch quickstart/phantoms_made
	$(PY) -m preprocess.prepare --input quickstart/raw --output quickstart/data --test_share 0.4
	$(PY) train.py --root_path quickstart/data --output quickstart/runs --resume auto $(TINY)
	$(PY) test.py --config quickstart/runs --volume_path quickstart/data \
		--output_dir quickstart/result --is_savenii
	@echo "Open quickstart/result/report.html: scores, worst slices and what they mean."
	@echo "Open quickstart/result/viewer.html: scroll through every case, truth beside prediction."
	@echo "Pictures of all cases: quickstart/result/overlays_1.png and overlays_2.png"

reproduce: .venv/installed
	$(PY) -m tools.reproduce --device $(DEVICE) $(if $(RAW),--raw "$(RAW)") $(if $(TRAIN),--train)

check: lint
	$(TESTS) -x -m "not slow"

test: lint
	$(TESTS)

.venv/installed-benchmarks: .venv/installed benchmarks/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

fuzz: .venv/installed-dev
	$(PY) tests/fuzz.py --minutes $(MINUTES)

benchmark: .venv/installed-benchmarks
	$(PY) -m benchmarks --device $(DEVICE)

gpu:
	$(PYTHON) -m benchmarks.gpu

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf quickstart .venv
