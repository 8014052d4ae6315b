PYTHON := .venv/bin/python
# A train step on CPU takes and returns 100 MiB: without huge pages much of its time is page faults. Elsewhere than
# on glibc this changes nothing.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-jax-next test-gpu check-gpu-compile check-tpu-compile lint types format lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## create or renew .venv from requirements.lock
	@bash .ci/setup.sh

demo: setup  ## train EFLA and DeltaNet on real sequential MNIST, on CPU
	$(HUGE_PAGES) $(PYTHON) -m experiments.smnist_robustness.demo

test: lint types  ## lint, types and every test that is not slow
	$(PYTHON) -m pytest -n 2 -m "not slow"

test-slow: setup  ## the tests marked slow
	$(PYTHON) -m pytest -n 2 -m slow

test-jax-next: setup  ## the kernels' tests that are not slow, on the newest JAX 0.12, in an environment of its own
	@bash .ci/environment.sh jax-next
	.cache/jax-next/bin/python -m pytest -n 2 -m "not slow" tests/pallas_kernels --ignore=tests/pallas_kernels/triton

# Without autotuning a program compiles sooner, and sums in one order. `make test-gpu PYTHON=python3` takes another
# environment than .venv; WORKERS processes share the card.
WORKERS := 12
GPU_TESTS := tests/ops tests/pallas_kernels/hopper $(wildcard tests/pallas_kernels/test_*.py) tests/on_device

test-gpu:  ## on an NVIDIA GPU: every test of the op against float64, kernels not interpreted, and 1000 equal runs
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false \
	XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
	    $(PYTHON) -m pytest -p no:benchmark -n $(WORKERS) --dist worksteal $(GPU_TESTS)

check-gpu-compile: setup  ## compile the GPU kernels without a GPU: registers, spills, shared memory, within budget
	@bash .ci/environment.sh gpu-compile
	.cache/gpu-compile/bin/python -m experiments.kernels.compile_gpu
	.cache/gpu-compile/bin/python -m experiments.kernels.check_triton

check-tpu-compile: setup  ## compile the TPU kernels for five generations without a TPU, and a training step on 4x4 chips
	@bash .ci/environment.sh tpu-compile
	.cache/tpu-compile/bin/python -m experiments.kernels.compile_tpu

lint: setup  ## formatting and lint
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

types: setup  ## static types
	.venv/bin/pyrefly check

format: setup  ## reformat and mend what can be mended
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

COMPILE := .venv/bin/uv pip compile --universal --python-version 3.12 --generate-hashes --no-emit-index-url \
    --custom-compile-command "make lock" --quiet

lock: setup  ## renew requirements.lock and .ci/*.lock (UPGRADE=--upgrade takes newer versions)
	$(COMPILE) $(UPGRADE) pyproject.toml --group dev --output-file requirements.lock
	$(COMPILE) $(UPGRADE) .ci/gpu-compile.in --output-file .ci/gpu-compile.lock
	$(COMPILE) $(UPGRADE) .ci/tpu-compile.in --output-file .ci/tpu-compile.lock
	$(COMPILE) $(UPGRADE) .ci/jax-next.in --no-config --output-file .ci/jax-next.lock  # pyproject.toml says 0.11.2

clean:  ## remove .venv, caches and build results; runs/ stays
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
