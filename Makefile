# The commands of the project. `make demo` and `make test` set up all that they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test fuzz lint benchmark gpu test-matrix sanitize clean

# Distil a student from a teacher on real text, with F.kl_div and with kldiv_ext, from logits and from hidden states.
demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

test: $(STAMP)
	$(BIN)/python -m pytest

# The property tests on ten thousand and more other calls each, which takes about half an hour.
fuzz: $(STAMP)
	$(BIN)/python -m pytest tests/test_properties.py --hypothesis-profile=fuzz

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')
	$(BIN)/mypy

# CPU and, where there is one, GPU: results as JSON, then the README's tables and the plots from them.
benchmark: $(STAMP)
	$(BIN)/python -m benchmarks --json benchmarks/results/$(shell date +%F).json
	$(BIN)/python -m benchmarks.linear --json benchmarks/results/linear-$(shell date +%F).json
	$(BIN)/python -m benchmarks.accuracy --json benchmarks/results/accuracy-$(shell date +%F).json
	$(BIN)/python -m benchmarks.report

# All that needs a GPU, in under ten minutes: tests, compute-sanitizer, measurements; then the tables and the plots.
gpu: $(STAMP)
	PYTHON=$(abspath $(BIN))/python benchmarks/gpu.sh build/gpu build tests sanitize benchmark accuracy report

# One wheel, built once, tested under the oldest and the newest torch.
test-matrix: $(STAMP)
	.ci/matrix $(BIN)/python

# The CPU kernels under the address, undefined-behaviour and thread sanitizers of gcc.
sanitize: $(STAMP)
	.ci/sanitize $(BIN)/python

$(STAMP): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "torch>=2.10" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,demo]"
	$(BIN)/python -m kldiv_ext.info
	touch $@

clean:
	rm -rf build dist *.egg-info kldiv_ext/*.so kldiv_ext/_build_info.py $(VENV)
