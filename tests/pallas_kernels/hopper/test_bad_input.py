"""What the kernels cannot serve is refused with the reason, and taken over by another implementation where asked."""

import re
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_attention
from pallas_kernels.hopper.mosaic import check_registers
from tests.pallas_kernels.hopper.helpers import rounded

pytestmark = pytest.mark.cpu("what is refused where there is no GPU")

ABSENT = r"needs a Hopper GPU \(compute capability 9.0\), or a context of .*force_gpu_interpret_mode"


def inputs_of(dtype=jnp.bfloat16, **sizes):
    return rounded(dtype=dtype, **dict(batch=1, length=3) | sizes)[0]


def kernel(inputs, implementation: Any = "pallas_gpu", **options):
    return efla_attention(**inputs, implementation=implementation, **options)


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap, jax.checkpoint], ids=["eager", "jit", "vmap", "remat"]
)
def test_no_gpu(transform):
    """Eagerly and under transformations: raised when it is lowered for this backend, so that it can be exported."""
    inputs = inputs_of()
    if transform is jax.vmap:
        inputs = {name: x[None] for name, x in inputs.items()}
    with pytest.raises(NotImplementedError, match=ABSENT):
        transform(kernel)(inputs)


def test_no_gpu_gradient():
    loss = lambda inputs: jnp.sum(kernel(inputs)[1])
    with pytest.raises(NotImplementedError, match=ABSENT):
        jax.jit(jax.grad(loss))(inputs_of())


def test_shapes_without_a_gpu():
    """Nothing is lowered: types come out."""
    output, state = jax.eval_shape(kernel, inputs_of())
    assert (output.shape, output.dtype) == ((1, 3, 1, 64), jnp.bfloat16)
    assert (state.shape, state.dtype) == ((1, 1, 64, 64), jnp.float32)


def mixed():
    inputs = inputs_of()
    return inputs | dict(value=inputs["value"].astype(jnp.float16))


UNSUPPORTED = {
    "float32": (lambda: inputs_of(np.float32), {}, "query, key and value are float32, float32, float32; the kernels"),
    "float64": (lambda: inputs_of(np.float64), {}, "take all bfloat16 or all float16"),
    "mixed": (mixed, {}, "query, key and value are bfloat16, bfloat16, float16; the kernels take all bfloat16 or all"),
    "K": (lambda: inputs_of(key_dim=129), {}, "K=129 and V=64; the kernels take at most 128 of both"),
    "V": (lambda: inputs_of(value_dim=256), {}, "K=64 and V=256; the kernels take at most 128 of both"),
    "chunk_size": (inputs_of, dict(chunk_size=32), "chunk_size=32; the kernels' chunks are of 64 tokens"),
    "precision": (inputs_of, dict(precision="highest"), "precision is HIGHEST; the kernels multiply in the inputs'"),
}  # fmt: skip


@pytest.mark.parametrize("interpreting", [False, True], ids=["no GPU", "interpreted"])
@pytest.mark.parametrize(("make", "options", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported(make, options, reason, interpreting, request):
    """When it is traced already, for whatever device: no export of it either."""
    if interpreting:
        request.getfixturevalue("races")
    with pytest.raises(NotImplementedError, match=f"'pallas_gpu' cannot serve this call: .*{re.escape(reason)}"):
        jax.eval_shape(partial(kernel, **options), make())


def test_unsupported_sequence():
    """Each fallback warns with its reason, whether the device or the call is at fault; the next one serves the call."""
    for make, reason in ((inputs_of, ABSENT), (lambda: inputs_of(np.float32), ABSENT)):
        inputs = make()
        with pytest.warns(UserWarning, match=f"falls back to 'xla': 'pallas_gpu' cannot serve this call: .*{reason}"):
            got = kernel(inputs, ("pallas_gpu", "xla"))
        for x, y in zip(got, kernel(inputs, "xla"), strict=True):
            np.testing.assert_array_equal(x, y)


def test_sequence_when_interpreted(races):
    with pytest.warns(UserWarning, match="falls back to 'xla': 'pallas_gpu' cannot serve this call: .*float32"):
        kernel(inputs_of(np.float32), ("pallas_gpu", "xla"))
    assert not races


def test_sequence_takes_the_kernel(interpreted):
    """Without a warning, which would fail the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(inputs_of(), ("pallas_gpu", "xla"))


def test_default_is_silent_on_a_cpu():
    inputs = inputs_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = kernel(inputs, None)
    for x, y in zip(got, kernel(inputs, "xla"), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(compute capability) has JAX say that this is such a GPU."""

    def pretend(capability):
        device = type("Device", (), dict(compute_capability=capability, device_kind="a GPU"))()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda *_: [device])

    return pretend


def trace(implementation):
    call = jax.jit(lambda x: kernel(x, implementation))
    return call.trace(inputs_of(length=70)).lower(lowering_platforms=("cuda",)).as_text()


def test_default_on_hopper(on_gpu):
    on_gpu("9.0")
    assert "efla_forward" in trace(None)


def test_other_gpus(on_gpu):
    """The default says once why it takes another; an explicit name raises."""
    on_gpu("8.0")
    with pytest.warns(
        UserWarning, match=f"'pallas_gpu' declined a call, taking the next: it {ABSENT}.*this one has 8.0"
    ):
        assert "efla_forward" not in trace(None)
    assert "efla_forward" not in trace(None)  # a second warning would fail the test
    with pytest.raises(NotImplementedError, match=f"{ABSENT}.*; this one has 8.0"):
        trace("pallas_gpu")


@pytest.mark.parametrize("roles", [((1, 176), (3, 88), (1, 24)), ((2, 168), (2, 88)), ((2, None), (1, None))], ids=str)
def test_registers_that_a_launch_gives(roles):
    check_registers(*roles)


def test_more_registers_than_a_launch_gives():
    """Five warpgroups have 5·96 registers, of which each thread has one of 65536 / (5·128), rounded down."""
    with pytest.raises(ValueError, match="512 in all; a launch gives 5 warpgroups 96 each"):
        check_registers((1, 176), (3, 104), (1, 24))
