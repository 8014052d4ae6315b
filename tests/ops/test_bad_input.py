"""Bad calls are refused by name, with what was given and what is needed; the choice of implementation is explained."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import delta_rule_attention, efla_attention, efla_step
from efla_jax.ops.registry import REGISTRY, Implementation
from tests.ops.helpers import draw

pytestmark = pytest.mark.cpu("what is chosen and refused where there is no GPU")

B, T, H, HK, K, V = 2, 6, 4, 2, 3, 5


def inputs(**changes: Any) -> dict[str, Any]:
    x = draw(batch=B, length=T, heads=H, key_heads=HK, key_dim=K, value_dim=V, decay=True)
    x["segment_ids"] = np.zeros((B, T), np.int32)
    return x | changes


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(key=ones(B, T, K)), "key has shape (2, 6, 3); it must be [B, T, Hk, K]"),
        (dict(query=ones(B, T, K)), "query has shape (2, 6, 3); it must be [B=2, T=6, Hk=2, K=3]"),
        (dict(query=ones(B, T, HK, 4)), "query has shape (2, 6, 2, 4); it must be [B=2, T=6, Hk=2, K=3]"),
        (dict(query=ones(B, T, H, K)), "query has shape (2, 6, 4, 3); it must be [B=2, T=6, Hk=2, K=3]"),
        (dict(query=ones(B, 5, HK, K)), "query has shape (2, 5, 2, 3); it must be [B=2, T=6, Hk=2, K=3]"),
        (dict(query=ones(1, T, HK, K)), "query has shape (1, 6, 2, 3); it must be [B=2, T=6, Hk=2, K=3]"),
        (dict(value=ones(B, T, H)), "value has shape (2, 6, 4); it must be [B=2, T=6, H, V]"),
        (dict(value=ones(3, T, H, V)), "value has shape (3, 6, 4, 5); it must be [B=2, T=6, H, V]"),
        (dict(value=ones(B, 7, H, V)), "value has shape (2, 7, 4, 5); it must be [B=2, T=6, H, V]"),
        (dict(value=ones(B, T, 3, V)), "value has H=3 heads; H must be a multiple of Hk=2, the heads of key"),
        (dict(value=ones(B, T, H, 0)), "key has K=3, value V=0; both must be at least 1"),
        (dict(beta=ones(B, T, HK)), "beta has shape (2, 6, 2); it must be [B=2, T=6, H=4]"),
        (dict(beta=ones(B, T, H, 1)), "beta has shape (2, 6, 4, 1); it must be [B=2, T=6, H=4]"),
        (dict(beta=ones(B, 1, H)), "beta has shape (2, 1, 4); it must be [B=2, T=6, H=4]"),
        (dict(log_decay=ones(1, T, H)), "log_decay has shape (1, 6, 4); it must be [B=2, T=6, H=4]"),
        (dict(log_decay=ones(B, T)), "log_decay has shape (2, 6); it must be [B=2, T=6, H=4]"),
        (
            dict(initial_state=ones(B, HK, K, V)),
            "initial_state has shape (2, 2, 3, 5); it must be [B=2, H=4, K=3, V=5]",
        ),
        (
            dict(initial_state=ones(B, H, V, K)),
            "initial_state has shape (2, 4, 5, 3); it must be [B=2, H=4, K=3, V=5]",
        ),
        (dict(segment_ids=np.zeros((B, 5), np.int32)), "segment_ids has shape (2, 5); it must be [B=2, T=6]"),
        (dict(segment_ids=ones(B, T)), "segment_ids is float32; it must be int32"),
        (dict(segment_ids=[[0] * T] * B), "segment_ids is list; it must be int32"),
        (dict(query=ones(B, T, HK, K, dtype=np.int32)), "query is int32; it must be an array of float32, bfloat16"),
        (dict(key=ones(B, T, HK, K, dtype=np.int8)), "key is int8; it must be an array of float32, bfloat16"),
        (dict(value=ones(B, T, H, V, dtype=bool)), "value is bool; it must be an array of float32, bfloat16"),
        (dict(beta=1.0), "beta is float; it must be an array of float32, bfloat16"),
        (dict(log_decay=ones(B, T, H, dtype=np.int32)), "log_decay is int32; it must be an array of float32"),
        (dict(initial_state=ones(B, H, K, V, dtype=np.int32)), "initial_state is int32; it must be an array of"),
        (dict(integrator="exat"), "integrator is 'exat'; it must be one of exact, split, euler, rk2, rk4, implicit"),
        (dict(integrator="exat"), "did you mean 'exact'?"),
        (dict(integrator=None), "integrator is None; it must be one of"),
        (
            dict(implementation="xl"),
            "implementation is 'xl'; it must be one of pallas_gpu, triton, pallas_tpu, xla, scan",
        ),
        (dict(implementation="xl"), "did you mean 'xla'?"),
        (dict(implementation=("scn", "xla")), "did you mean 'scan'?"),
        (dict(implementation=()), "implementation is (); it must be a name, a sequence of names or None"),
        (dict(chunk_size=48), "chunk_size is 48; it must be a power of two or None"),
        (dict(chunk_size=0), "chunk_size is 0; it must be a power of two or None"),
        (dict(chunk_size=16.0), "chunk_size is 16.0; it must be a power of two or None"),
        (dict(scale=jnp.ones(())), "it must be a Python number (multiply query by a traced scale)"),
        (dict(precision="hihgest"), "hihgest"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_attention(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        efla_attention(**inputs(**changes))


def test_traced_scale():
    with pytest.raises(ValueError, match=r"scale is .*; it must be a Python number"):
        jax.jit(lambda scale: efla_attention(**inputs(scale=scale)))(2.0)


@pytest.mark.parametrize("name", ["erase", "write"])
def test_coefficients(name):
    x = inputs(erase=ones(B, T, H), write=ones(B, T, H))
    del x["beta"]
    with pytest.raises(ValueError, match=re.escape(f"{name} has shape (2, 6, 2); it must be [B=2, T=6, H=4]")):
        delta_rule_attention(**x | {name: ones(B, T, HK)})
    with pytest.raises(ValueError, match=f"{name} is int32; it must be an array of float32"):
        delta_rule_attention(**x | {name: ones(B, T, H, dtype=np.int32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(key=ones(B, 1, HK, K)), "key has shape (2, 1, 2, 3); it must be [B, Hk, K]"),
        (dict(query=ones(B, HK, 4)), "query has shape (2, 2, 4); it must be [B=2, Hk=2, K=3]"),
        (dict(value=ones(3, H, V)), "value has shape (3, 4, 5); it must be [B=2, H, V]"),
        (dict(value=ones(B, 3, V)), "value has H=3 heads; H must be a multiple of Hk=2"),
        (dict(beta=ones(B)), "beta has shape (2,); it must be [B=2, H=4]"),
        (dict(log_decay=ones(B, HK)), "log_decay has shape (2, 2); it must be [B=2, H=4]"),
        (dict(state=ones(B, H, V, K)), "state has shape (2, 4, 5, 3); it must be [B=2, H=4, K=3, V=5]"),
        (dict(state=None), "state is NoneType; it must be an array of float32"),
        (dict(query=ones(B, HK, K, dtype=np.int32)), "query is int32; it must be an array of float32"),
        (dict(integrator="rk3"), "integrator is 'rk3'; it must be one of"),
        (dict(scale=None), "scale is None; it must be a Python number"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_step(changes, message):
    x = draw(batch=B, length=1, heads=H, key_heads=HK, key_dim=K, value_dim=V)
    x["state"] = x.pop("initial_state")
    x |= {name: x[name][:, 0] for name in ("query", "key", "value", "beta")}
    with pytest.raises(ValueError, match=re.escape(message)):
        efla_step(**x | changes)


# The choice of implementation. Fake kernels show which was taken by a marker in the output.


def fake(reason=None, backend=None):
    """A kernel that returns 42s, or declines with a reason."""

    def run(query, key, value, erase, write, log_decay, initial_state, segment_ids, **options):
        return jnp.full_like(value, 42), initial_state

    return Implementation(run, lambda call: reason, backend=backend)


def taken(implementation):
    """Whether the fake served the call."""
    out, _ = efla_attention(**inputs(implementation=implementation))
    return bool(np.all(out == 42))


def test_a_name_never_falls_back(monkeypatch):
    monkeypatch.delitem(REGISTRY, "pallas_tpu")
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu' cannot serve this call: .*has no such kernel"):
        taken("pallas_tpu")
    monkeypatch.setitem(REGISTRY, "triton", fake("K = 3 is odd"))
    with pytest.raises(NotImplementedError, match="'triton' cannot serve this call: K = 3 is odd"):
        taken("triton")
    monkeypatch.setitem(REGISTRY, "triton", fake())
    assert taken("triton")


def test_a_sequence_warns_on_each_fallback(monkeypatch):
    monkeypatch.delitem(REGISTRY, "pallas_tpu")
    monkeypatch.setitem(REGISTRY, "triton", fake("K = 3 is odd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert not taken(["pallas_tpu", "triton", "xla"])
    messages = [str(w.message) for w in caught]
    assert len(messages) == 4
    assert re.search("falls back to 'xla': 'pallas_tpu' cannot serve this call: .*no such kernel", messages[0])
    assert re.search("falls back to 'xla': 'triton' cannot serve this call: K = 3 is odd", messages[1])
    assert messages[2:] == messages[:2]


def test_a_sequence_raises_with_every_reason(monkeypatch):
    monkeypatch.delitem(REGISTRY, "pallas_tpu")
    monkeypatch.setitem(REGISTRY, "triton", fake("K = 3 is odd"))
    with pytest.raises(NotImplementedError) as error:
        taken(["triton", "pallas_tpu"])
    assert "'triton' cannot serve this call: K = 3 is odd" in str(error.value)
    assert "'pallas_tpu' cannot serve this call: this version of efla_jax has no such kernel" in str(error.value)


def test_a_sequence_takes_the_first_that_serves(monkeypatch):
    monkeypatch.setitem(REGISTRY, "triton", fake())
    assert taken(["triton", "xla"])
    assert not taken(["xla", "triton"])


def test_none_takes_this_backends_kernel(monkeypatch):
    assert not taken(None)
    monkeypatch.setitem(REGISTRY, "triton", fake(backend="cpu"))
    assert taken(None)


def test_none_passes_over_other_backends_silently(monkeypatch):
    monkeypatch.setitem(REGISTRY, "triton", fake("not asked", backend="gpu"))
    monkeypatch.setitem(REGISTRY, "pallas_tpu", fake(backend="tpu"))
    assert not taken(None)  # a warning would fail the test


def test_none_warns_once_when_this_backends_kernel_declines(monkeypatch):
    monkeypatch.setitem(REGISTRY, "triton", fake("K = 3 is odd, says the test of None", backend="cpu"))
    with pytest.warns(UserWarning, match="'triton' declined a call, taking the next: K = 3 is odd"):
        assert not taken(None)
    assert not taken(None)  # a second warning would fail the test


def test_what_an_implementation_is_asked(monkeypatch):
    """`Call` has the sizes, types and options of this very call."""
    calls = []
    monkeypatch.setitem(REGISTRY, "triton", Implementation(fake().run, lambda call: calls.append(call)))
    efla_attention(**inputs(implementation="triton", chunk_size=16, precision="highest"))
    efla_attention(
        **inputs(implementation="triton", log_decay=None, segment_ids=None, value=ones(B, T, H, V, dtype=jnp.bfloat16))
    )
    first, second = calls
    assert (first.batch, first.length, first.key_heads, first.heads, first.key_dim, first.value_dim) == (
        B,
        T,
        HK,
        H,
        K,
        V,
    )
    assert (first.chunk_size, first.precision, first.backend) == (16, jax.lax.Precision.HIGHEST, "cpu")
    assert (first.log_decay, first.segments, second.log_decay, second.segments) == (True, True, False, False)
    assert second.dtypes == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert second.precision is None
