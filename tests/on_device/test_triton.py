"""The Triton kernels on the card, by the cases and bounds of experiments/kernels/triton_cases.py."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernels.triton_cases import CASES, allowed, draw, errors, evaluate
from pallas_kernels import triton
from pallas_kernels.triton import tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing())),
]

# The tiles are those of the card; float32 is for the interpreter alone.
RUN = list(dict.fromkeys(replace(case, capability=0) for case in CASES if case.dtype in tiling.DTYPES))


@pytest.mark.parametrize("case", RUN, ids=str)
def test_accurate(case):
    inputs = draw(case)
    with jax.default_device(jax.devices("cpu")[0]):
        want = evaluate(inputs, case.scale, np.float64)
        limits = allowed(case, inputs, want)
    found = errors(evaluate(inputs, case.scale, np.float32, "triton", jnp.dtype(case.dtype)), want)
    too_far = {name: (e, limits[name]) for name, e in found.items() if not e <= limits[name]}
    assert not too_far, f"errors and their bounds: {too_far}"
