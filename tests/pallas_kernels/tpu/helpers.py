"""Bounds on error of the TPU kernels.

bfloat16 by the model of the Hopper kernels: a factor of the error of `xla`, which rounds the same intermediates.
float32 by the model of the op's own tests: a factor of what the float32 token loop makes.
"""

import jax.numpy as jnp
import numpy as np

from tests.ops import helpers
from tests.ops.helpers import evaluate
from tests.pallas_kernels.hopper.helpers import too_far

NAME = "pallas_tpu"


def assert_accurate(inputs, cotangent, **options):
    """The kernels agree with the float64 token loop, in output, state and the gradient of every input."""
    options = dict(cotangent=cotangent) | options
    if inputs["key"].dtype == np.float32:
        helpers.assert_accurate(inputs, implementation=NAME, **options)
        return
    chunk_size = options.pop("chunk_size", None)
    got = evaluate(inputs, implementation=NAME, chunk_size=chunk_size, **options)
    want = evaluate(inputs, np.float64, implementation="scan", **options)
    xla = evaluate(inputs, implementation="xla", chunk_size=64, **options)  # its chunks on accelerators
    found = too_far(got, want, xla)
    assert not found, f"errors and their bounds: {found}"
    for name, x in inputs.items():
        assert got[f"d_{name}"].dtype == x.dtype
        assert got[f"d_{name}"].shape == x.shape
    assert got["output"].dtype == jnp.bfloat16
