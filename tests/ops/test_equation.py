"""The token loop against the differential equation itself, by `scipy.linalg.expm` of the augmented generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from efla_jax import efla_attention
from efla_jax.ops.coefficients import INTEGRATORS, erase_and_write
from tests.ops.helpers import draw

pytestmark = pytest.mark.cpu("the float64 loop itself, which serves as the oracle on the CPU")

LENGTH = 6


def flow(key, value, beta, log_decay, state):
    """exp of [[A, F], [0, 0]] over one unit: e^A S + ∫ e^{As} F ds, with A = -(γI + βkkᵀ) and F = βkvᵀ."""
    size = len(key)
    generator = np.zeros((size + len(value),) * 2)
    generator[:size, :size] = log_decay * np.eye(size) - beta * np.outer(key, key)
    generator[:size, size:] = beta * np.outer(key, value)
    step = scipy.linalg.expm(generator)
    return step[:size, :size] @ state + step[:size, size:]


def integrate(inputs, scale=1.0, segment_ids=None):
    """(output, state) of the equation, head by head; value head h reads key head h // (H / Hk)."""
    batch, length, heads = inputs["value"].shape[:3]
    shared = heads // inputs["key"].shape[2]
    out, last = np.zeros_like(inputs["value"]), np.zeros_like(inputs["initial_state"])
    log_decay = inputs.get("log_decay", np.zeros((batch, length, heads)))
    for b, h in np.ndindex(batch, heads):
        state = inputs["initial_state"][b, h]
        for t in range(length):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                state = np.zeros_like(state)
            key, value = inputs["key"][b, t, h // shared], inputs["value"][b, t, h]
            state = flow(key, value, inputs["beta"][b, t, h], log_decay[b, t, h], state)
            out[b, t, h] = scale * state.T @ inputs["query"][b, t, h // shared]
        last[b, h] = state
    return out, last


def loop(inputs, **options):
    with jax.enable_x64(True):
        call = jax.jit(lambda inputs: efla_attention(**inputs, implementation="scan", **options))
        return tuple(map(np.asarray, call(inputs)))


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("segments", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("norm2", [1e-8, 1.0, 30.0])
def test_exact_is_the_flow(norm2, decay, segments):
    inputs = draw(length=LENGTH, norm2=norm2, decay=decay, dtype=np.float64)
    options = dict(scale=0.7, segment_ids=np.array([[0, 0, 1, 1, 0, 0], [3, 3, 3, 3, 3, 4]]) if segments else None)
    for got, want in zip(loop(inputs, **options), integrate(inputs, **options), strict=True):
        assert relative(got, want) < 1e-13


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_order_of_convergence(integrator, decay):
    """Each token taken in n substeps of β/n and g/n: the error against the flow falls as n^-order."""
    inputs = draw(length=LENGTH, norm2=2.0, decay=decay, dtype=np.float64)
    want = integrate(inputs)[1]

    def error(substeps):
        divided = {name: np.repeat(x, substeps, 1) for name, x in inputs.items() if name != "initial_state"}
        divided["beta"] = divided["beta"] / substeps
        if decay:
            divided["log_decay"] = divided["log_decay"] / substeps
        divided["initial_state"] = inputs["initial_state"]
        return relative(loop(divided, integrator=integrator)[1], want)

    coarse, fine = error(8), error(16)
    if integrator == "exact" or (integrator == "split" and not decay):
        assert max(error(1), coarse, fine) < 1e-12
        return
    # All but `exact` take decay and rank-one term one after the other: first order however good the second is.
    order = 1 if decay else dict(euler=1, implicit=1, rk2=2, rk4=4)[integrator]
    assert fine < 0.02
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("norm2", [1e-6, 1.0, 1e3])
def test_unit_keys(norm2, decay):
    """S_t = e^g (I - a u uᵀ) S + b u vᵀ with u = k/‖k‖, a = 1 - e^{-βλ}, b = w‖k‖."""
    inputs = draw(length=LENGTH, heads=2, norm2=norm2, decay=decay, dtype=np.float64)
    key, beta, state = inputs["key"], inputs["beta"], inputs["initial_state"]
    norm = np.linalg.norm(key, axis=-1)
    unit, lam, gamma = key / norm[..., None], norm**2, -inputs.get("log_decay", np.zeros_like(beta))
    a = -np.expm1(-beta * lam)
    b = beta * -np.expm1(-(gamma + beta * lam)) / (gamma + beta * lam) * norm
    assert np.all((a >= 0) & (a <= 1))
    for t in range(LENGTH):
        u, weight = unit[:, t, :, :, None], lambda x, t=t: x[:, t, :, None, None]
        state = weight(np.exp(-gamma)) * (state - weight(a) * u * (u.swapaxes(-1, -2) @ state))
        state = state + weight(b) * u * inputs["value"][:, t, :, None, :]
    assert relative(loop(inputs)[1], state) < 1e-13


@pytest.mark.parametrize("norm2", [0.0, 1e-8, 1.0, 1e3, 1e8])
def test_never_expands(norm2):
    """‖I - αkkᵀ‖₂ ≤ 1, up to the rounding of the product αkkᵀ, for any key and beta in float32."""
    rng = np.random.default_rng(0)
    key = rng.normal(size=(50, 1, 6))
    key = (key * np.sqrt(norm2 / np.sum(key**2, -1, keepdims=True))).astype(np.float32)
    for beta in (0.0, 0.5, 1e4):
        erase, _ = erase_and_write(jnp.asarray(key), jnp.full((50, 1), beta, jnp.float32))
        outer = (
            np.asarray(erase, np.float64)[..., None, None] * key[..., :, None] * key[..., None, :].astype(np.float64)
        )
        norms = np.linalg.norm(np.eye(6) - outer, 2, (-2, -1))
        assert np.all(norms <= 1 + 1e-6)
