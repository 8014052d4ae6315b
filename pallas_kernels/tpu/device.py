"""Whether what is traced now can run TPU kernels."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

NO_DEVICE = "it needs a TPU, or a context of jax.experimental.pallas.tpu.force_tpu_interpret_mode to be interpreted"


def interpreting() -> bool:
    """Whether kernels traced here are interpreted as TPU kernels; GPU kernels share the flag, not its type.

    JAX offers no public way to ask; a kernel that does nothing is traced and its parameter read.
    """
    same_everywhere = jax.typeof(0.0).manual_axis_type  # asked for inside a caller's shard_map
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, manual_axis_type=same_everywhere)
    equations = jax.make_jaxpr(pl.pallas_call(lambda in_ref, out_ref: None, out_shape=x))(x).eqns
    found = next(equation.params["interpret"] for equation in equations if "interpret" in equation.params)
    return isinstance(found, pltpu.InterpretParams)


def absent() -> str | None:
    """Why the kernels cannot run here, or None."""
    return None if interpreting() or jax.default_backend() == "tpu" else NO_DEVICE
