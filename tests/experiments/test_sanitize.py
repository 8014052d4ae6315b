"""What compute-sanitizer is pointed at: every kind of kernel, with arguments that fit it."""

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
    results = lambda *given: dict(sound=jnp.zeros(2), broken=jnp.full(3, jnp.nan))
    assert run(variant, {variant[0]: results}) == ["float32[3]"]


def test_it_refuses_a_cpu():
    command = [sys.executable, "-m", "experiments.kernels.sanitize", "--only=decode"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "the kernels need a GPU" in done.stdout + done.stderr


def test_every_backward_kernel_has_a_forward_one_that_saves():
    names = {variant[0] for variant in VARIANTS}
    assert {forward_name(name) for name in names if name.startswith("backward")} <= names
