# make test    set-up, then every test                      make docs     the DocC catalogue into out/docs
# make demo    compare policies on the packaged model       make lint     style, reported
# make bench   the benchmark, JSON lines into out/          make format   style, applied
# make ptx     the CUDA kernels, compiled by NVRTC        make device-test  what a machine with a card runs
#
# QUICK=1 shortens demo and bench. POLICIES, CONTEXT, MODEL and TEXT choose what demo compares.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: device-test host-time help setup test test-library test-kernels test-examples test-threads kvlab demo bench docs ptx lint format clean

SWIFT ?= swift
OUT ?= out
SWIFT_SOURCES := Package.swift Sources Tests Examples/Package.swift Examples/Sources Examples/Tests

KVLAB_FLAGS :=
ifneq ($(strip $(MODEL)),)
KVLAB_FLAGS += --model $(MODEL)
endif
ifneq ($(strip $(TEXT)),)
KVLAB_FLAGS += --text $(TEXT)
endif

ifneq ($(strip $(QUICK)),)
KVLAB_FLAGS += --quick
BENCH_FLAGS ?= --filter T4096
endif
ifneq ($(strip $(POLICIES)),)
KVLAB_FLAGS += --policies '$(POLICIES)'
endif
ifneq ($(strip $(CONTEXT)),)
KVLAB_FLAGS += --context $(CONTEXT)
endif

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 6

setup:
	@.ci/setup

test: test-library test-kernels test-examples
	@echo "test: library, C kernels and examples passed"

test-library: setup
	@echo "== library (debug)"
	@$(SWIFT) build --build-tests --quiet
	@$(SWIFT) test --skip-build 2>&1 | .ci/summary

test-kernels: setup
	@echo "== C kernels against the portable reference"
	@mkdir -p .build/ckernels
	@CC="$${CC:-$$(.ci/clang)}" OUT="$(CURDIR)/.build/ckernels" bash Tests/CKernels/run.sh

test-examples: setup
	@echo "== examples (release)"
	@$(SWIFT) build -c release --package-path Examples --build-tests --quiet
	@$(SWIFT) test -c release --package-path Examples --skip-build 2>&1 | .ci/summary

# Everything that runs on several threads, under the thread sanitizer, which cannot follow the fibres of the emulated
# card.
test-threads: setup
	@echo "== threads (sanitizer)"
	@$(SWIFT) build --build-tests --sanitize=thread --scratch-path .build-tsan --quiet
	@KV_THREADS=4 $(SWIFT) test --skip-build --sanitize=thread --scratch-path .build-tsan \
	  --filter 'threads|batch' --skip CUDATests 2>&1 | .ci/summary

kvlab: setup
	@echo "== kvlab (release)"
	@$(SWIFT) build -c release --package-path Examples --product kvlab --quiet

KVLAB = "$$($(SWIFT) build -c release --package-path Examples --show-bin-path)/kvlab"

demo: kvlab
	@mkdir -p $(OUT)
	@$(KVLAB) compare $(KVLAB_FLAGS) --json $(OUT)/compare.json | tee $(OUT)/compare.txt
	@echo "demo: $(OUT)/compare.txt and $(OUT)/compare.json"

bench: kvlab
	@mkdir -p $(OUT)
	@$(KVLAB) bench $(BENCH_FLAGS) --json $(OUT)/bench.json | tee $(OUT)/bench.txt
	@echo "bench: $(OUT)/bench.txt and $(OUT)/bench.json"

docs: setup
	@.ci/docs

# Needs no GPU: NVRTC comes from the Python environment, or for this one run from its package.
ptx:
	@python3 .ci/ptx

# A folder that runs on a machine with a card and nothing else: kvlab, the libraries it needs, and a script.
device-test: setup
	@.ci/device-test

# What the host does for a decoded token: decoding on a driver whose calls return at once.
NULL_CUDA = $(CURDIR)/.build/null-cuda
host-time: kvlab
	@mkdir -p $(OUT) $(NULL_CUDA)
	@$${CC:-$$(.ci/clang)} -O2 -shared -fPIC -Wl,-soname,libcuda.so.1 -ISources/CKVCUDA/include \
	  -o $(NULL_CUDA)/libcuda.so.1 Tests/NullCUDA/libcuda.c
	@LD_PRELOAD=$(NULL_CUDA)/libcuda.so.1 $(KVLAB) bench --backend cuda --filter host --contexts 32768 --seconds 2 \
	  --json $(OUT)/host.json | tee $(OUT)/host.txt

lint:
	@$(SWIFT) format lint --strict --parallel --recursive --configuration .swift-format $(SWIFT_SOURCES)

format:
	@$(SWIFT) format --in-place --parallel --recursive --configuration .swift-format $(SWIFT_SOURCES)

clean:
	@rm -rf .build .build-tsan Examples/.build $(OUT)
