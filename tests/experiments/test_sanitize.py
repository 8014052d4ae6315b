"""What compute-sanitizer is pointed at: every kind of kernel, with arguments that fit it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernels.sanitize import SMALL, arguments, forward_name, run
from pallas_kernels.hopper import variants

VARIANTS = list(variants(**SMALL))
ROOT = Path(__file__).parents[2]


def test_small_variants_are_the_same_kinds():
    assert [variant[:2] for variant in VARIANTS] == [variant[:2] for variant in variants()]
    assert max(x.size for variant in VARIANTS for x in jax.tree.leaves(variant[3])) < 2**23


@pytest.mark.parametrize(
    "name", ["forward-128x128-tied-exact", "backward-64x64-decay-documents", "decode-64x64-tokens16"]
)
def test_arguments_fit(name):
    variant = next(variant for variant in VARIANTS if variant[0].startswith(name))
    shapes = variant[3]
    residuals = lambda *given: (None, None, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes[8]))
    made = arguments(variant, residuals)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)
    assert described(list(made)) == described(list(shapes))
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(made))


def test_what_is_not_finite_is_told():
    variant = VARIANTS[0]
    unwritten = jnp.full(5, jnp.nan)
    results = lambda *given: (jnp.zeros(2), jnp.full(3, jnp.nan), (unwritten,))
    assert run(variant, {variant[0]: results}) == ["float32[3]"]


def test_memory_is_allocated_to_the_byte_and_nothing_tried_out():
    """Of the running program, before it has looked at a device."""
    allocation = {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    program = f"""
import os
from jax._src import xla_bridge
from experiments.kernels import sanitize

def variants(**small):
    print(xla_bridge.backends_are_initialized(), *(os.environ[name] for name in {(*allocation, "XLA_FLAGS")}))
    return ()

sanitize.variants = variants
sanitize.app.run(sanitize.main)
"""
    environment = {name: value for name, value in os.environ.items() if name not in allocation}
    environment["XLA_FLAGS"] = "--xla_dump_max_hlo_modules=3"
    command = [sys.executable, "-c", program, "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.strip() == "False cuda_async false --xla_dump_max_hlo_modules=3 --xla_gpu_autotune_level=0"


def test_it_refuses_a_cpu():
    command = [sys.executable, "-m", "experiments.kernels.sanitize", "--only=decode"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "the kernels need a GPU" in done.stdout + done.stderr


def test_every_backward_kernel_has_a_forward_one_that_saves():
    names = {variant[0] for variant in VARIANTS}
    assert {forward_name(name) for name in names if name.startswith("backward")} <= names
