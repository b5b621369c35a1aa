# The commands of the project; `make help` lists them. Each sets up what it needs in .venv and says what it is doing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
ALL_ARCHITECTURES := 8.0;8.6;8.9;9.0;10.0;12.0+PTX
# CUDA kernels are built for CUDA_ARCHITECTURES: by default those of the GPUs in this machine, without one none. Where
# the variable is set, CUDA kernels that cannot be built are an error.
ifeq ($(origin CUDA_ARCHITECTURES),undefined)
CUDA_ARCHITECTURES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | grep -oxE '[0-9]+\.[0-9]+' | sort -u | paste -sd ';')
else
REQUIRED := FORCE_CUDA=1
endif
ifeq ($(CUDA_ARCHITECTURES),)
BUILD := FORCE_CPU=1
TARGETS := the CPU alone (about 2 minutes on 2 cores)
else
BUILD := $(REQUIRED) TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHITECTURES)'
TARGETS := the CPU and CUDA $(CUDA_ARCHITECTURES) (about 4 minutes and 2 per architecture on 2 cores)
endif

BIN := $(VENV)/bin
# The objects are built in place: the stamp names the environment and the architectures that they were built with.
empty :=
STAMP := build/.built$(subst /,-,$(abspath $(VENV)))-cpu-$(subst $(empty) $(empty),-,$(subst ;,-,$(CUDA_ARCHITECTURES)))
ifeq ($(filter oneshell,$(.FEATURES)),)
$(error GNU make 3.82 or later is needed)
endif
say = echo; echo "== $(1)"

.PHONY: help demo test check-all docs fuzz lint benchmark gpu test-matrix sanitize clean

help:  ## list the commands
	sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

demo: $(STAMP)  ## distil a student with F.kl_div and with kldiv_ext, side by side (about 3 minutes)
	$(call say,Demo: distil a student on real text with F.kl_div; from logits; from hidden states)
	$(BIN)/python -m examples.demo

test: $(STAMP)  ## the tests, on every CPU core (about 10 minutes on 2 cores)
	$(call say,Tests: about 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

check-all:  ## what CI checks, with CUDA kernels for all six architectures (about an hour on 2 cores)
	$(call say,All checks in a fresh environment with CUDA $(ALL_ARCHITECTURES): about an hour on 2 cores)
	env -u MAKEFLAGS -u VENV CUDA_ARCHITECTURES='$(ALL_ARCHITECTURES)' .ci/run

docs: $(STAMP)  ## build the documentation into build/site (seconds)
	$(call say,Documentation)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fuzz: $(STAMP)  ## the property tests with ten thousand fresh calls each (half an hour)
	$(call say,Property tests with ten thousand fresh calls each: about half an hour)
	$(BIN)/python -m pytest tests/test_properties.py --hypothesis-profile=fuzz

lint: $(STAMP)  ## style and types (seconds)
	$(call say,Style and types)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')
	$(BIN)/mypy

benchmark: $(STAMP)  ## measure on the CPU and on a GPU if there is one; write JSON, tables and plots (half an hour)
	$(call say,Measurements into benchmarks/results: about half an hour)
	$(BIN)/python -m benchmarks --json benchmarks/results/$$(date +%F).json
	$(BIN)/python -m benchmarks.linear --json benchmarks/results/linear-$$(date +%F).json
	$(BIN)/python -m benchmarks.accuracy --json benchmarks/results/accuracy-$$(date +%F).json
	$(BIN)/python -m benchmarks.report

gpu: $(STAMP)  ## everything that needs a GPU: tests, sanitizers, measurements, accuracy (10 minutes)
	$(call say,Everything that needs a GPU into build/gpu: 10 minutes)
	PYTHON=$(abspath $(BIN))/python benchmarks/gpu.sh build/gpu build tests sanitize benchmark linear accuracy report

test-matrix: $(STAMP)  ## one wheel under the oldest and the newest torch (half an hour)
	$(call say,One wheel under the oldest and the newest torch: about half an hour)
	.ci/matrix $(BIN)/python

sanitize: $(STAMP)  ## the CPU kernels under gcc's address, undefined-behaviour and thread sanitizers (20 minutes)
	$(call say,CPU kernels under sanitizers: about 20 minutes)
	.ci/sanitize $(BIN)/python

$(STAMP): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(call say,Installing PyTorch and the tools into $(VENV): several gigabytes the first time)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install "$(TORCH)" "setuptools>=77" wheel ninja
	$(call say,Building kldiv_ext for $(TARGETS))
	mkdir -p build
	rm -f build/.built-* kldiv_ext/_C*.so
	SECONDS=0
	if ! $(BUILD) $(BIN)/pip install --verbose --no-build-isolation --editable ".[dev,demo,docs]" 2>&1 \
	    | tee build/install.log | sed -unE 's#^ *(\[[0-9]+/[0-9]+\]).* -o [^ ]*/([^ ]+)\.o.*#  \1 \2#p'; then
	  tail -n 60 build/install.log
	  exit 1
	fi
	echo "built in $$SECONDS s"
	$(BIN)/python -m kldiv_ext.info
	touch $@

clean:  ## remove what was built, and .venv
	rm -rf build dist *.egg-info kldiv_ext/*.so kldiv_ext/_build_info.py $(VENV)
