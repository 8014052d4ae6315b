"""The name "triton" where its kernels cannot run: an explicit name gives the reason, None passes over it."""

import re
import subprocess
import sys
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import delta_rule_attention, efla_attention
from efla_jax.ops.registry import REGISTRY
from pallas_kernels import triton as kernels
from pallas_kernels.triton import tiling

MISSING = r"'triton' cannot serve this call: jax-triton cannot be imported .*install the extra 'triton'"
NO_GPU = "needs an NVIDIA GPU of compute capability 8.0 or higher"


@pytest.fixture(autouse=True)
def not_installed(monkeypatch):
    """As if jax-triton were not there, whether it is or not."""
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.delitem(sys.modules, "pallas_kernels.triton.host", raising=False)
    monkeypatch.delattr(kernels, "host", raising=False)
    kernels.missing.cache_clear()
    yield
    monkeypatch.undo()
    kernels.missing.cache_clear()


def gpu(monkeypatch, capability):
    """JAX as it presents itself on a GPU of this capability."""
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])


def inputs(dtype=jnp.bfloat16, key_dim=16, value_dim=16) -> dict[str, Any]:
    tokens = lambda *shape: jnp.asarray(np.random.default_rng(0).uniform(size=(1, 3, 2, *shape)))
    query = tokens(key_dim).astype(dtype)
    return dict(query=query, key=query, value=tokens(value_dim).astype(dtype), beta=tokens())


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap, jax.grad], ids=["eager", "jit", "vmap", "grad"])
def test_a_name_raises_at_once(transform):
    given = inputs()
    if transform is jax.vmap:
        given = {name: x[None] for name, x in given.items()}
    attend = lambda given: efla_attention(**given, implementation="triton")[0].sum()
    with pytest.raises(NotImplementedError, match=MISSING):
        jax.make_jaxpr(transform(attend))(given)  # no later than when it is traced


def test_every_call_on_sequences():
    given = inputs()
    erase = given.pop("beta")
    with pytest.raises(NotImplementedError, match=MISSING):
        delta_rule_attention(**given, erase=erase, write=erase / 2, implementation="triton")


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        (dict(dtype=jnp.float32), {}, "float32, float32, float32; the kernels take all bfloat16 or all float16"),
        (dict(key_dim=24), {}, "K is 24; the kernels take 16, 32, 64, 128"),
        (dict(value_dim=512), {}, "V is 512; the kernels take 16, 32, 64, 128, 256"),
        ({}, dict(chunk_size=32), "chunk_size=32; the kernels' chunks are of 64 tokens"),
        ({}, dict(precision="highest"), "precision is HIGHEST"),
    ],
)
def test_what_it_does_not_serve(sizes, options, reason):
    """What no installation would change is said first."""
    with pytest.raises(NotImplementedError, match=f"'triton' cannot serve this call: .*{re.escape(reason)}"):
        efla_attention(**inputs(**sizes), implementation="triton", **options)


def test_a_sequence_warns():
    with pytest.warns(UserWarning, match=f"falls back to 'xla': 'triton' cannot serve this call: it {NO_GPU}"):
        got = efla_attention(**inputs(), implementation=("triton", "xla"))
    for x, y in zip(got, efla_attention(**inputs(), implementation="xla"), strict=True):
        np.testing.assert_array_equal(x, y)


def test_none_is_silent_on_a_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = efla_attention(**inputs())
    for x, y in zip(got, efla_attention(**inputs(), implementation="xla"), strict=True):
        np.testing.assert_array_equal(x, y)


def test_none_says_what_to_install(monkeypatch):
    """One warning with every kernel's reason, where none of this GPU's serves."""
    gpu(monkeypatch, "8.6")
    trace = lambda: jax.make_jaxpr(lambda x: efla_attention(**x))(inputs(key_dim=32))
    with pytest.warns(UserWarning, match="'pallas_gpu' declined .*'triton' declined .*install the extra") as caught:
        trace()
    assert len(caught) == 1


def test_none_is_silent_where_it_serves(monkeypatch):
    """On a GPU that is not Hopper's; the kernels of Hopper are no matter there."""
    gpu(monkeypatch, "8.9")
    monkeypatch.setattr(kernels, "missing", lambda: None)
    served = REGISTRY["triton"]
    marked = lambda query, key, value, *_, **__: (jnp.full_like(value, 42), jnp.zeros(()))
    monkeypatch.setitem(REGISTRY, "triton", type(served)(marked, served.supported, served.absent, served.backend))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "42.0" in str(jax.make_jaxpr(lambda x: efla_attention(**x)[0])(inputs()))


@pytest.mark.parametrize(
    ("compute_capability", "found", "reason"),
    [
        ("8.0", 80, None),
        ("9.0", 90, None),
        ("12.0", 120, None),
        ("7.5", 75, f"{NO_GPU}; this one has 7.5"),
        ("gfx942", None, NO_GPU),  # ROCm
        (None, None, NO_GPU),
    ],
)
def test_devices(compute_capability, found, reason, monkeypatch):
    gpu(monkeypatch, compute_capability)
    assert tiling.capability() == found
    absent = kernels.absent()
    assert absent is None if reason is None else absent is not None and absent.endswith(reason)


def test_a_cpu_is_no_device():
    assert tiling.capability() is None
    assert kernels.absent() == f"it {NO_GPU}"


def test_the_library_does_not_import_it():
    code = "import sys, efla_jax; print(sorted({'triton', 'jax_triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
