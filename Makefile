# `make train` and `make test` do all the set-up on a fresh machine: Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(shell echo ,gpu))

.PHONY: train test bench lint docs gpu null-gpu clean

train: $(READY)
	$(BIN)/python -m pera_fast.train $(ARGS)

# Two at a time: most tests start processes of one thread, and wait for them.
test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Threads wait as in training (pera_fast/_cli.py). Loss, ViT and step are measured again with a malloc that gives no
# memory back: training's (pera_fast/run.py), jemalloc and a GPU's allocator give none, either. One file per machine
# under bench/results/, then the README's table from it.
bench: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest bench/ --benchmark-only -q --benchmark-json=.benchmark.json $(ARGS)
	OMP_WAIT_POLICY=passive MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 $(BIN)/python -m pytest \
	  bench/bench_distill_loss.py bench/bench_koleo.py bench/bench_vit.py bench/bench_step.py \
	  --benchmark-only -q --benchmark-json=.benchmark-malloc.json $(ARGS)
	$(BIN)/python bench/results.py save .benchmark.json .benchmark-malloc.json
	$(BIN)/python bench/results.py readme

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ with the API reference and the tables of bench/results, in site/: open site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Build, GPU tests, memory checker, benchmarks: everything lands in $$OUT (default: gpu_out).
gpu:
	@if command -v nvidia-smi >/dev/null; then bash bench/gpu.sh; else echo "no GPU found"; fi

# A GPU's memory and the host's work without one: PYTHON has a CUDA build of torch; nvcc is needed.
null-gpu:
	$(PYTHON) bench/null_gpu.py

# torch goes first: the extension is then built against the very torch it will run with.
$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python >= 3.10 is needed, got " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
