"""The kernels on a GPU, through jax-triton."""

import functools
import inspect

import jax_triton

from pallas_kernels.triton.launch import Call, Launch

# jax-triton 0.3 (Triton 3.6) and 0.4 (Triton 3.7 and newer) name it differently.
_OUTPUTS = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"


@functools.cache
def caller(capability: int) -> Call:
    """A `Call` for a device of this compute capability, which need not be there."""

    def call(x: Launch, /):
        return jax_triton.triton_call(
            *x.inputs,
            *x.sizes,
            kernel=x.kernel,
            grid=(x.programs,),
            name=f"delta_rule_{x.kernel.__name__}",
            num_warps=x.tile.warps,
            num_stages=x.tile.stages,
            compute_capability=capability,
            **{_OUTPUTS: x.outputs},
            **x.constants,
        )

    return call
