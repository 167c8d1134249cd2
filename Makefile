# make demo | test | lint | bench | verify ...: each sets up .venv first if needed (once), and rebuilds the extension if csrc/ changed.
#   PYTHON=python3.12                the Python that .venv is made with
#   TORCH="torch==2.11.0"            another torch; the pins of torch and triton in constraints.txt then do not apply
#   PIP_ARGS="--index-url ..."       passed to every pip install
#   VENV=none                        use $(PYTHON) as it is: install nothing, only build the extension in place
#   ARGS="..."                       for the command: of pytest, bench, the demo, or the one PART of verify
PYTHON ?= python3
VENV ?= .venv
PINNED_TORCH := $(shell grep "^torch==" constraints.txt)
TORCH ?= $(PINNED_TORCH)
PIP_ARGS ?=
DEMO_CONFIG ?= python_trainer/configs/reviews_cpu.yaml
PART ?=
ARGS ?=

SOURCES := $(shell find csrc -type f) csrc/cpu csrc/cuda CMakeLists.txt setup.py ppo_kernels/_source_hash.py
.DELETE_ON_ERROR:
.PHONY: missing help build test lint bench demo docs verify wheel clean

help:
	@echo "make build     the extension; the first time a virtual environment in $(VENV) too"
	@echo "make test      the tests that every change has to pass: six minutes on two cores"
	@echo "make lint      ruff, clang-format and mypy"
	@echo "make bench     the speed of every op beside other libraries (ARGS: --quick, --full, --gpu, --check, --accuracy, --trainers)"
	@echo "make demo      train a small model on a CPU and plot its learning"
	@echo "make docs      the documentation, into build/docs"
	@echo "make verify    what make test leaves out, hours of it; PART=\"build aot\" for some; ARGS=--list names the parts"
	@echo "make wheel     a wheel in dist/"
	@echo "make clean     remove everything that was built"
	@echo
	@echo "Options: PYTHON= TORCH= PIP_ARGS= VENV=none ARGS= (see the top of the Makefile)"

ifeq ($(VENV),none)
BIN :=
RUN := $(PYTHON)
# One stamp for each Python and torch that is used as it is.
STATE := build/with-$(shell $(PYTHON) -c "import sys, importlib.metadata as m; print(sys.implementation.cache_tag + '-torch' + m.version('torch'))")
INSTALLED := $(STATE)/.checked

$(INSTALLED):
	@PYTHON="$(PYTHON)" .ci/preflight none
	@mkdir -p $(STATE) && touch $@
else
BIN := $(VENV)/bin/
RUN := $(VENV)/bin/python
STATE := $(VENV)
INSTALLED := $(VENV)/.installed-$(shell echo "$(TORCH)" | cksum | cut -d " " -f 1)
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --constraint $(VENV)/constraints.txt $(PIP_ARGS)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

$(INSTALLED): constraints.txt pyproject.toml
	@PYTHON="$(PYTHON)" .ci/preflight
	@rm -f $(VENV)/.installed-* && test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@cp constraints.txt $(VENV)/constraints.txt
	@test "$(TORCH)" = "$(PINNED_TORCH)" || sed -i.all -e '/^torch==/d' -e '/^triton==/d' $(VENV)/constraints.txt
	@echo "Setting up $(VENV), once: $(TORCH) and its libraries (the large download)"
	@$(PIP) "$(TORCH)"
	@echo "Setting up $(VENV), once: build tools, then DeepSpeed, transformers and the test tools (about a minute)"
	@$(PIP) setuptools wheel cmake ninja pybind11
	@$(PIP) --no-build-isolation --editable ".[trainer,test,lint]"
	@touch $@
endif

BUILT := $(STATE)/.built-$(PPO_KERNELS_CUDA)-$(PPO_KERNELS_SANITIZE)

build: $(BUILT)

$(BUILT): $(INSTALLED) $(SOURCES) $(if $(wildcard ppo_kernels/_C.*.so),,missing)
	@echo "Building the extension"
	@rm -f $(STATE)/.built-*
	@$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

test: build
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests --ignore tests/verify -q --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)clang-format --dry-run -Werror
	$(RUN) -m mypy ppo_kernels python_trainer

# Other libraries, without their dependencies, where only the benchmarks look.
PEERS := build/peers/.installed
$(PEERS): bench/peers.txt $(INSTALLED)
	@rm -rf build/peers
	@$(RUN) -m pip --disable-pip-version-check install --quiet --no-deps --target build/peers $(PIP_ARGS) -r bench/peers.txt \
	  && touch $@ || echo "Not all could be fetched: their rows will be skipped"

# TRL with what its trainers import, and what verl, OpenRLHF and SkyRL import, where only the part `adapters` of verify looks.
ADAPTERS := build/adapters/.installed
$(ADAPTERS): tests/verify/adapters/packages.txt bench/trainers.txt $(INSTALLED)
	@rm -rf build/adapters build/trainers
	@$(RUN) -m pip --disable-pip-version-check install --quiet --no-deps --target build/trainers $(PIP_ARGS) -r bench/trainers.txt \
	  && $(RUN) -m pip --disable-pip-version-check install --quiet --no-deps --target build/adapters $(PIP_ARGS) \
	  -r tests/verify/adapters/packages.txt && touch $@ || echo "Not all could be fetched: what needs it will be skipped"

bench: build $(if $(filter none,$(VENV)),,$(PEERS))
	@$(RUN) -m bench $(ARGS)

demo: build
	$(RUN) -m python_trainer demo --config $(DEMO_CONFIG) $(ARGS)

docs: build $(if $(filter none,$(VENV)),,$(STATE)/.docs)
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

$(VENV)/.docs: $(INSTALLED)
	@$(PIP) --no-build-isolation --editable ".[docs]"
	@touch $@

TRAINERS := $(if $(filter none,$(VENV)),,$(if $(PART),$(if $(filter adapters,$(PART)),$(PEERS) $(ADAPTERS)),$(PEERS) $(ADAPTERS)))
verify: build $(TRAINERS)
	@$(RUN) -m tests.verify $(PART) $(if $(ARGS),$(if $(PART),--) $(ARGS))

wheel: $(INSTALLED)
	$(RUN) -m pip --disable-pip-version-check wheel . --no-deps --no-build-isolation -w dist $(PIP_ARGS)

clean:
	rm -rf build dist *.egg-info ppo_kernels/*.so
	$(if $(filter-out none,$(VENV)),rm -rf $(VENV))
