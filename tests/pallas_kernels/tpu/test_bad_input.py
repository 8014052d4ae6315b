"""What the kernels cannot serve is refused with the reason, and taken over by another implementation where asked."""

import re
import warnings
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_attention, efla_step
from tests.pallas_kernels.hopper.helpers import rounded

pytestmark = pytest.mark.cpu("what is refused where there is no TPU")

ABSENT = r"needs a TPU, or a context of .*force_tpu_interpret_mode"


def inputs_of(dtype=jnp.bfloat16, **sizes):
    return rounded(dtype=dtype, **dict(batch=1, length=3) | sizes)[0]


def kernel(inputs, implementation: Any = "pallas_tpu", **options):
    return efla_attention(**inputs, implementation=implementation, **options)


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap, jax.checkpoint], ids=["eager", "jit", "vmap", "remat"]
)
def test_no_tpu(transform):
    """Eagerly and under transformations: raised when it is lowered for this backend, so that it can be exported."""
    inputs = inputs_of()
    if transform is jax.vmap:
        inputs = {name: x[None] for name, x in inputs.items()}
    with pytest.raises(NotImplementedError, match=ABSENT):
        transform(kernel)(inputs)


def test_no_tpu_gradient():
    loss = lambda inputs: jnp.sum(kernel(inputs)[1])
    with pytest.raises(NotImplementedError, match=ABSENT):
        jax.jit(jax.grad(loss))(inputs_of())


def test_interpreting_gpu_kernels_is_not_enough():
    """Both interpreters are asked for by one flag."""
    with (
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
        pytest.raises(NotImplementedError, match=ABSENT),
    ):
        kernel(inputs_of())


def test_no_tpu_step():
    inputs = inputs_of(length=1)
    token = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}
    with pytest.raises(NotImplementedError, match=ABSENT):
        efla_step(**token, state=inputs["initial_state"], implementation="pallas_tpu")


def mixed():
    inputs = inputs_of()
    return inputs | dict(value=inputs["value"].astype(np.float32))


UNSUPPORTED = {
    "float16": (lambda: inputs_of(jnp.float16), {}, "query, key and value are float16, float16, float16; the kernels"),
    "mixed": (mixed, {}, "query, key and value are bfloat16, bfloat16, float32; the kernels take all bfloat16 or all"),
    "K": (lambda: inputs_of(key_dim=257), {}, "K=257 and V=64; the kernels take at most 256 of both"),
    "V": (lambda: inputs_of(value_dim=300), {}, "K=64 and V=300; the kernels take at most 256 of both"),
    "chunk_size": (inputs_of, dict(chunk_size=32), "chunk_size=32; the kernels' chunks are of 64, 128, 256 tokens"),
    "group": (
        lambda: inputs_of(heads=64, key_dim=256, value_dim=256), {},
        "Hk=1, H=64, K=256, V=256; the fewest heads that a step of the kernels can take would need more than 15 MiB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("interpreting", [False, True], ids=["no TPU", "interpreted"])
@pytest.mark.parametrize(("make", "options", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported(make, options, reason, interpreting, request):
    """When it is traced already, for whatever device: no export of it either."""
    if interpreting:
        request.getfixturevalue("races")
    with pytest.raises(NotImplementedError, match=f"'pallas_tpu' cannot serve this call: .*{re.escape(reason)}"):
        jax.eval_shape(partial(kernel, **options), make())


@pytest.mark.parametrize("dims", [(60, 64), (64, 320)], ids=str)
def test_unsupported_step(dims):
    inputs = inputs_of(length=1, key_dim=dims[0], value_dim=dims[1])
    token = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}
    reason = f"K={dims[0]} and V={dims[1]}; the kernel takes 64, 128, 192, 256"
    with pytest.raises(NotImplementedError, match=reason):
        efla_step(**token, state=inputs["initial_state"], implementation="pallas_tpu")


def test_unsupported_sequence():
    """Each fallback warns with its reason; the next one serves the call."""
    inputs = inputs_of()
    with pytest.warns(UserWarning, match=f"falls back to 'xla': 'pallas_tpu' cannot serve this call: .*{ABSENT}"):
        got = kernel(inputs, ("pallas_tpu", "xla"))
    for x, y in zip(got, kernel(inputs, "xla"), strict=True):
        np.testing.assert_array_equal(x, y)


def test_default_is_silent_on_a_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(inputs_of(), None)


@pytest.fixture
def on_tpu(monkeypatch):
    """JAX says that this is a TPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def trace(implementation, **sizes):
    call = jax.jit(lambda x: kernel(x, implementation))
    return call.trace(inputs_of(**dict(length=70) | sizes)).lower(lowering_platforms=("tpu",)).as_text()


def test_default_on_a_tpu(on_tpu):
    assert "efla_forward" in trace(None)


def test_default_declined_on_a_tpu(on_tpu):
    """It says once why it takes another; an explicit name raises."""
    half = dict(dtype=jnp.float16)
    with pytest.warns(UserWarning, match="'pallas_tpu' declined a call, taking the next: .*float16"):
        assert "efla_forward" not in trace(None, **half)
    assert "efla_forward" not in trace(None, **half)  # a second warning would fail the test
    with pytest.raises(NotImplementedError, match="float16"):
        trace("pallas_tpu", **half)
