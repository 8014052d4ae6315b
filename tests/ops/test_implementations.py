"""Every implementation against the float64 token loop: outputs, final state and the gradient of every input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import delta_rule_attention, efla_attention
from efla_jax.ops import blocks
from efla_jax.ops.coefficients import INTEGRATORS, erase_and_write
from tests.ops.helpers import EPS, FACTOR, MINIMUM, assert_accurate, cotangents, draw, errors, evaluate

DECAYS = pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["scan", "xla"])


SLOW_LENGTHS = [pytest.param(length, marks=pytest.mark.slow) for length in (2, 100)]


@pytest.mark.parametrize("length", [1, 63, 64, 1000, *SLOW_LENGTHS])  # 65 stands in the tests below
def test_lengths(length):
    assert_accurate(draw(length=length, decay=True))


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "heads", "key_heads"),
    [(1, 1, 1, 1), pytest.param(3, 1, 2, 2, marks=pytest.mark.slow), (1, 6, 3, 1), (17, 33, 2, 2)],
)
def test_shapes(key_dim, value_dim, heads, key_heads):
    """Slow keys: with K = 1 every other forgets all of the state, and the gradient of what it was is but rounding."""
    sizes = dict(key_dim=key_dim, value_dim=value_dim, heads=heads, key_heads=key_heads)
    assert_accurate(draw(**sizes, length=40, norm2=0.1), scale=0.3)


AT_EVERY_NORM = [
    pytest.param(integrator, decay, marks=() if integrator in quick else pytest.mark.slow, id=f"{integrator}-{name}")
    for decay, name, quick in (
        (False, "no decay", INTEGRATORS),
        (True, "decay", ("exact", "split", "implicit")),
    )
    for integrator in INTEGRATORS
]


@pytest.mark.parametrize(("integrator", "decay"), AT_EVERY_NORM)
def test_integrators_at_every_norm(integrator, decay):
    """Every decade of ‖k‖² from 1e-8 to 1e3; up to 1 for the integrators that explode beyond.

    With chunks of 16 on every backend: see `test_a_state_forgotten_within_a_chunk`.
    """
    top = 0 if integrator in ("euler", "rk2", "rk4") else 3
    for decade in range(-8, top + 1):
        assert_accurate(draw(norm2=10.0**decade, decay=decay), integrator=integrator, chunk_size=16)


@pytest.mark.parametrize("chunk_size", [64, 128])
def test_a_state_forgotten_within_a_chunk(chunk_size):
    """A chunk takes what it forgets from the state all at once: the error is that of the larger state before it."""
    inputs = draw(norm2=1e3, length=64)
    start, want = inputs["initial_state"], evaluate(inputs, np.float64, implementation="scan")["state"]
    got = evaluate(inputs, implementation="xla", chunk_size=chunk_size)["state"]
    before, left = np.linalg.norm(start), np.linalg.norm(want)
    assert before > 10 * left
    assert np.linalg.norm(got - want) < FACTOR * MINIMUM * EPS * before


@DECAYS
def test_special_keys(decay):
    """Zero and repeated keys, beta 0 and large, in one sequence."""
    inputs = draw(decay=decay)
    inputs["key"][:, 3::4] = 0
    inputs["key"][:, 1::4] = inputs["key"][:, :1]
    inputs["beta"][:, 2::5] = 0
    inputs["beta"][:, 4::5] *= 50
    assert_accurate(inputs)


def test_same_key_throughout():
    """Parallel keys make the triangular system as ill-conditioned as it gets."""
    inputs = draw(norm2=1e3)
    inputs["key"][:] = inputs["key"][:, :1]
    assert_accurate(inputs)


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 64, 128])
def test_chunk_sizes(chunk_size):
    assert_accurate(draw(length=100, decay=True), chunk_size=chunk_size)


@DECAYS
def test_blocks(monkeypatch, decay):
    """Blocks of 2 chunks of 8: 7 chunks make 4 blocks, the last of them padded."""
    for name in ("_CPU_BLOCK", "_ACCELERATOR_BLOCK"):
        monkeypatch.setattr(blocks, name, 2 * 4 * 16)
    assert blocks.cut(2, 55, 4, 2, 8)[:3] == (4, 2, 8)
    inputs, ids = draw(length=55, decay=decay), np.repeat([[0], [1]], 55, 1)
    ids[1, 30:] = 2
    assert_accurate(inputs, chunk_size=8, segment_ids=ids)


@DECAYS
@pytest.mark.parametrize("norm2", [1e-8, 1.0, 1e3])
def test_float64(norm2, decay):
    inputs = draw(norm2=norm2, decay=decay, dtype=np.float64)
    want = evaluate(inputs, np.float64, implementation="scan")
    got = evaluate(inputs, np.float64, implementation="xla")
    assert all(x.dtype == np.float64 for x in got.values())
    assert max(errors(got, want).values()) < 1e-12


@IMPLEMENTATIONS
@DECAYS
def test_gradient_at_zero_keys(implementation, decay):
    """∂L/∂k at k = 0 is w·(dS v), not 0: against central differences of the float64 loop, in every direction."""
    inputs = draw(batch=1, length=5, heads=2, key_heads=1, key_dim=2, decay=decay, dtype=np.float64)
    inputs["key"][:] = 0
    weights = cotangents(inputs)

    def loss(key):
        results = efla_attention(**inputs | dict(key=key), implementation="scan")
        return sum(jnp.sum(x * c) for x, c in zip(results, weights, strict=True))

    with jax.enable_x64(True):
        steps = 1e-5 * np.eye(inputs["key"].size).reshape(-1, *inputs["key"].shape)
        difference = jax.jit(jax.vmap(lambda step: (loss(step) - loss(-step)) / 2e-5))(steps)
        want = np.asarray(difference).reshape(inputs["key"].shape)
    assert np.all(want != 0)
    for dtype, tolerance in ((np.float64, 1e-8), (np.float32, 1e-5)):
        got = evaluate(inputs, dtype, implementation=implementation)
        np.testing.assert_allclose(got["d_key"], want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_one_zero_key(integrator):
    """One token with k = 0: ∂L/∂k = w (dS v) with dS = d_state + scale q d_outᵀ, in closed form."""
    inputs = draw(length=1, heads=2, decay=True)
    inputs["key"][:] = 0
    d_out, d_state = cotangents(inputs)
    gamma = -inputs["log_decay"][:, 0].astype(np.float64)
    write = inputs["beta"][:, 0] * (-np.expm1(-gamma) / gamma if integrator == "exact" else 1)
    d_state = d_state + 0.5 * inputs["query"][:, 0, :, :, None] * d_out[:, 0, :, None, :]
    want = write[..., None] * np.einsum("bhkv,bhv->bhk", d_state, inputs["value"][:, 0])
    for implementation in ("scan", "xla"):
        got = evaluate(inputs, implementation=implementation, integrator=integrator, scale=0.5)
        np.testing.assert_allclose(got["d_key"][:, 0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu("the library of a GPU sums in another order for another length")
@IMPLEMENTATIONS
def test_padding_keeps_the_state(implementation):
    """beta = 0 (and no decay) leaves every bit of the state, however large the padded keys and values are."""
    inputs = draw(length=40, decay=True)
    short = {name: x if name == "initial_state" else x[:, :25] for name, x in inputs.items()}
    want = evaluate(short, implementation=implementation, chunk_size=16)
    inputs["beta"][:, 25:] = inputs["log_decay"][:, 25:] = 0
    inputs["key"][:, 25:] *= 1e3
    got = evaluate(inputs, implementation=implementation, chunk_size=16)
    np.testing.assert_array_equal(got["state"], want["state"])
    np.testing.assert_array_equal(got["output"][:, :25], want["output"])

    inputs["beta"][:] = inputs["log_decay"][:] = 0
    got = evaluate(inputs, implementation=implementation, chunk_size=16)
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])


def test_value_heads_read_their_key_head():
    """H = 4, Hk = 2 equals keys repeated by hand, and the gradients of a key head are the sum over its group."""
    inputs = draw(decay=True)
    repeated = {name: np.repeat(x, 2, 2) if name in ("query", "key") else x for name, x in inputs.items()}
    for implementation in ("scan", "xla"):
        want = evaluate(repeated, implementation=implementation)
        for name in ("d_query", "d_key"):
            want[name] = want[name].reshape(2, 65, 2, 2, 5).sum(3)
        got = evaluate(inputs, implementation=implementation)
        assert max(errors(got, want).values()) < 2e-6


def test_any_coefficients():
    """`delta_rule_attention` with erase and write of its own: no relation between them is assumed."""
    inputs = draw(decay=True)
    erase, write = (np.random.default_rng(i).uniform(size=inputs["beta"].shape) for i in (7, 8))

    def run(implementation, dtype):
        op = lambda query, key, value, erase, write, log_decay, initial_state: delta_rule_attention(
            query, key, value, erase, write, log_decay=log_decay, initial_state=initial_state,
            implementation=implementation,
        )  # fmt: skip
        arrays = [inputs["query"], inputs["key"], inputs["value"], erase, write]
        arrays = [np.asarray(x, dtype) for x in (*arrays, inputs["log_decay"], inputs["initial_state"])]
        with jax.enable_x64(dtype == np.float64):
            results, pullback = jax.vjp(jax.jit(op), *arrays)
            gradients = pullback(tuple(jnp.asarray(c, dtype) for c in cotangents(inputs)))
        return {str(i): np.asarray(x) for i, x in enumerate((*results, *gradients))}

    want = run("scan", np.float64)
    assert max(errors(run("xla", np.float64), want).values()) < 1e-12
    assert max(errors(run("xla", np.float32), want).values()) < 2e-6


def test_both_calls_are_one_function():
    inputs = draw(decay=True)
    arguments = {name: x for name, x in inputs.items() if name != "beta"}
    erase, write = erase_and_write(inputs["key"], inputs["beta"], inputs["log_decay"])
    for implementation in ("scan", "xla"):
        got = efla_attention(**inputs, implementation=implementation)
        want = delta_rule_attention(**arguments, erase=erase, write=write, implementation=implementation)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_types(implementation, dtype):
    """Output in value's type, state in float32, gradients in the type of what they belong to."""
    inputs = draw(length=4, dtype=dtype)
    inputs["beta"] = inputs["beta"].astype(np.float32)
    got = evaluate(inputs, implementation=implementation)
    assert got["output"].dtype == dtype
    assert got["state"].dtype == np.float32
    for name, x in inputs.items():
        assert (got[f"d_{name}"].dtype, got[f"d_{name}"].shape) == (x.dtype, x.shape)


@IMPLEMENTATIONS
def test_numpy_float64(implementation):
    """NumPy's float64 is float32 unless x64 is on, without a warning, as everywhere in JAX."""
    inputs = draw(length=4, decay=True)
    got = efla_attention(**{name: x.astype(np.float64) for name, x in inputs.items()}, implementation=implementation)
    want = efla_attention(**inputs, implementation=implementation)
    assert all(x.dtype == np.float32 for x in got)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@IMPLEMENTATIONS
def test_deterministic(implementation):
    """Two runs, and a run compiled anew, give the same bits."""
    inputs = draw(decay=True)
    first, second = (evaluate(inputs, implementation=implementation) for _ in range(2))
    jax.clear_caches()
    third = evaluate(inputs, implementation=implementation)
    for name, other in itertools.product(first, (second, third)):
        np.testing.assert_array_equal(first[name], other[name])
