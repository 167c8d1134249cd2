# make demo | test | lint | bench | quick ...: each sets up .venv first if needed (once), and rebuilds the extension if csrc/ changed.
#   PYTHON=python3.12                the Python that .venv is made with
#   TORCH="torch==2.11.0"            another torch; the pins of torch and triton in constraints.txt then do not apply
#   PIP_ARGS="--index-url ..."       passed to every pip install
#   VENV=none                        use $(PYTHON) as it is: install nothing, only build the extension in place
PYTHON ?= python3
VENV ?= .venv
PINNED_TORCH := $(shell grep "^torch==" constraints.txt)
TORCH ?= $(PINNED_TORCH)
PIP_ARGS ?=
REPORT ?= build/report
DEMO_CONFIG ?= python_trainer/configs/reviews_cpu.yaml
ARGS ?=

SOURCES := $(shell find csrc -type f) csrc/cpu csrc/cuda CMakeLists.txt setup.py
.DELETE_ON_ERROR:
.PHONY: missing help demo test learn faults gates planted sanitize accuracy lint bench report peers quick setup build env clean

help:
	@echo "make demo      train a small model on a CPU and plot its learning"
	@echo "make test      the test suite"
	@echo "make learn     every algorithm, three seeds, beside the known optimum of a small task: one table"
	@echo "make gates     the GPU kernels without a GPU: CUDA on the host, with sanitizers; what all need of the hardware"
	@echo "make faults    kill -9, full disks, damage, dead ranks: what becomes of a run, one row each"
	@echo "make lint      ruff, clang-format and mypy"
	@echo "make quick     one table of every op's speed on a CPU, in two minutes (ARGS=--check: fail on a missed target)"
	@echo "make bench     the benchmarks of the ops beside other libraries, small shapes, 3 minutes (ARGS=--bench-size=full)"
	@echo "make report    the same at full size, 5 minutes, as tables, figures and an HTML page in $(REPORT)"
	@echo "make accuracy  errors against float64, beside those of eager code"
	@echo "make planted   plants bugs, one at a time, and says which of them the tests notice"
	@echo "make sanitize  the tests of the C++ ops under address, undefined-behaviour and thread sanitizers"
	@echo "make env       what is installed, what is built, and which implementation each op picks"
	@echo "make build     only the extension (make setup: only .venv);  make clean: remove everything that was built"
	@echo
	@echo "Options: PYTHON= TORCH= PIP_ARGS= VENV=none (see the top of the Makefile), ARGS= (for pytest or the demo)"

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

setup: $(INSTALLED)
build: $(BUILT)

$(BUILT): $(INSTALLED) $(SOURCES) $(if $(wildcard ppo_kernels/_C.*.so),,missing)
	@echo "Building the extension"
	@rm -f $(STATE)/.built-*
	@$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

demo: build
	$(RUN) -m python_trainer demo --config $(DEMO_CONFIG) $(ARGS)

test: build
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -q --numprocesses 2 --dist loadscope \
	  --ignore tests/trainer --ignore tests/verify $(ARGS)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/trainer -q --numprocesses 2 --dist loadfile $(ARGS)

learn: build
	$(RUN) -m pytest tests/trainer/test_learn.py -m learn -q $(ARGS)

# Other libraries, without their dependencies, where only the benchmarks look.
PEERS := build/peers/.installed
PEERS_WANTED := $(if $(filter none,$(VENV)),,$(PEERS))
peers: $(PEERS)
$(PEERS): bench/peers.txt $(INSTALLED)
	@rm -rf build/peers
	@$(RUN) -m pip --disable-pip-version-check install --quiet --no-deps --target build/peers $(PIP_ARGS) -r bench/peers.txt \
	  && touch $@ || echo "Not all could be fetched: their rows will be skipped"

bench: build $(PEERS_WANTED)
	$(RUN) -m pytest bench --benchmark-only -q $(ARGS)

report: build $(PEERS_WANTED)
	@mkdir -p $(REPORT)
	$(RUN) -m pytest bench --benchmark-only -q --bench-size full --benchmark-json $(REPORT)/results.json $(ARGS); \
	  status=$$?; $(RUN) -m bench.report $(REPORT)/results.json && exit $$status

quick: build
	@$(RUN) -m bench.quick $(ARGS)

# What can be shown of the GPU kernels without a GPU. Halves of it at a time: each uses one core, mostly.
gates: build
	OMP_NUM_THREADS=1 PPO_KERNELS_HOST_CUDA=1 $(RUN) -m pytest tests -q --numprocesses 2 --dist loadscope -k cuda \
	  --ignore tests/trainer --ignore tests/verify
	$(RUN) -m tests.verify.sanitize.run --together cuda_address cuda_thread
	$(RUN) -m pytest tests/verify/aot -q -rs $(ARGS)

faults: build
	@$(RUN) -m tests.trainer.faults $(ARGS)

planted: build
	$(RUN) -m tests.verify.mutants.run $(ARGS)

sanitize: setup
	$(RUN) -m tests.verify.sanitize.run $(ARGS)

accuracy: build
	@$(RUN) -m bench.accuracy

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)clang-format --dry-run -Werror
	$(RUN) -m mypy ppo_kernels python_trainer

env: build
	@$(RUN) -m ppo_kernels.env

clean:
	rm -rf build dist *.egg-info ppo_kernels/*.so
	$(if $(filter-out none,$(VENV)),rm -rf $(VENV))
