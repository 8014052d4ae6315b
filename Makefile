PYTHON := .venv/bin/python
# A train step on CPU takes and returns 100 MiB: without huge pages much of its time is page faults. Elsewhere than
# on glibc this changes nothing.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types format lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## create or renew .venv from requirements.lock
	@bash .ci/setup.sh

demo: setup  ## train EFLA and DeltaNet on real sequential MNIST, on CPU
	$(HUGE_PAGES) $(PYTHON) -m experiments.smnist_robustness.demo

test: lint types  ## lint, types and every test that is not slow
	$(PYTHON) -m pytest -n 2 -m "not slow"

test-slow: setup  ## the tests marked slow
	$(PYTHON) -m pytest -n 2 -m slow

lint: setup  ## formatting and lint
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

types: setup  ## static types
	.venv/bin/pyrefly check

format: setup  ## reformat and mend what can be mended
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

lock: setup  ## renew requirements.lock (UPGRADE=--upgrade takes newer versions)
	.venv/bin/uv pip compile pyproject.toml --group dev --universal --python-version 3.12 \
	    --generate-hashes --no-emit-index-url --custom-compile-command "make lock" \
	    --quiet $(UPGRADE) --output-file requirements.lock

clean:  ## remove .venv, caches and build results; runs/ stays
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
