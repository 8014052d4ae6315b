"""`exact_gain` and its derivatives against closed forms in 60-digit arithmetic; the other integrators' formulas."""

import decimal
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax.ops.coefficients import INTEGRATORS, accumulator_dtype, erase_and_write, exact_gain

# beta, λ, γ: x = γ + βλ from 0 and 1e-12 up to 1e4, both sides of the border of the series, each factor 0 once
POINTS = [
    (beta, x / beta * part, x * (1 - part))
    for x in (0.0, 1e-12, 1e-8, 1e-4, 0.01, 0.3, 0.4999, 0.5001, 1.0, 3.0, 20.0, 80.0, 1e3, 1e4)
    for beta in (1e-6, 0.3, 1.0, 50.0)
    for part in (1.0, 0.5, 0.0)
] + [(0.0, lam, gamma) for lam in (0.0, 1.0, 1e4) for gamma in (0.0, 1e-12, 2.0)]


def phi(x):
    """φ₁ = (1 - e^{-x})/x and its first two derivatives."""
    if x == 0:
        return Decimal(1), Decimal(-1) / 2, Decimal(1) / 3
    small = (-x).exp()
    value = (1 - small) / x
    slope = (small - value) / x
    return value, slope, (-small - 2 * slope) / x


def gain(beta, lam, gamma):
    """Value, gradient and Hessian by (beta, λ, γ) of β φ₁(γ + βλ)."""
    value, slope, bend = phi(gamma + beta * lam)
    gradient = [value + beta * lam * slope, beta**2 * slope, beta * slope]
    by_beta = [
        2 * lam * slope + beta * lam**2 * bend,
        2 * beta * slope + beta**2 * lam * bend,
        slope + beta * lam * bend,
    ]
    hessian = [by_beta, [by_beta[1], beta**3 * bend, beta**2 * bend], [by_beta[2], beta**2 * bend, beta * bend]]
    return value * beta, gradient, hessian


@pytest.fixture(scope="module")
def exact():
    """Value [n], gradient [n, 3], Hessian [n, 3, 3] at the points as float32 holds them, in float64."""
    with decimal.localcontext(prec=60):
        rows = [gain(*(Decimal(float(np.float32(x))) for x in point)) for point in POINTS]
    return tuple(np.array([row[i] for row in rows], np.float64) for i in range(3))


def computed(dtype):
    with jax.enable_x64(dtype == np.float64):
        points = jnp.asarray(np.array(POINTS, np.float32), dtype)
        fn = lambda point: exact_gain(*point)
        run = jax.jit(lambda points: tuple(jax.vmap(f)(points) for f in (fn, jax.grad(fn), jax.hessian(fn))))
        return tuple(map(np.asarray, run(points)))


@pytest.mark.parametrize(("dtype", "roundings"), [(np.float32, 8), (np.float64, 8)])
def test_exact_gain(exact, dtype, roundings):
    """Element by element. e^{-x} turns a rounding of x into x roundings; nothing else may lose digits."""
    value, gradient, hessian = computed(dtype)
    eps, smallest = np.finfo(dtype).eps, np.finfo(dtype).tiny
    beta, lam, gamma = np.array(POINTS).T
    within = roundings * eps * (1 + gamma + beta * lam)
    np.testing.assert_array_less(abs(value - exact[0]), roundings * eps * exact[0] + smallest)
    error = abs(gradient - exact[1]) - smallest
    np.testing.assert_array_less(error, within[:, None] * abs(exact[1]) + (exact[1] == 0) * eps)
    assert np.all(np.isfinite(hessian))


def test_second_derivatives(exact):
    """They may cancel, but not by more than the half of float64."""
    _, _, hessian = computed(np.float64)
    size = np.abs(exact[2]).max((1, 2), keepdims=True)
    np.testing.assert_array_less(abs(hessian - exact[2]), 1e-6 * abs(exact[2]) + 1e-9 * size)


def series(integrator, beta, x):
    if integrator == "rk4":
        return beta * sum((-x) ** n / np.prod(np.arange(1, n + 2)) for n in range(4))
    forms = dict(split=beta * -np.expm1(-x) / x, euler=beta, rk2=beta * (1 - x / 2), implicit=beta / (1 + x))
    return forms[integrator]


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_integrators(integrator, decay):
    rng = np.random.default_rng(0)
    key, beta = rng.normal(size=(2, 5, 2, 3)), rng.uniform(0.1, 1, size=(2, 5, 4))
    log_decay = -rng.uniform(0.1, 1, size=beta.shape)
    x = beta * np.repeat(np.sum(key**2, -1), 2, -1)
    want = series("split" if integrator == "exact" else integrator, beta, x)
    want_write = want
    if integrator == "exact" and decay:
        want_write = beta * -np.expm1(log_decay - x) / (x - log_decay)
    with jax.enable_x64(True):
        log_decay = jnp.asarray(log_decay) if decay else None
        erase, write = erase_and_write(jnp.asarray(key), jnp.asarray(beta), log_decay, integrator)
    np.testing.assert_allclose(erase, want, rtol=1e-13)
    np.testing.assert_allclose(write, want_write, rtol=1e-13)


def test_unknown_integrator():
    unknown: Any = "exat"
    with pytest.raises(ValueError, match="integrator is 'exat'; it must be one of exact, split"):
        erase_and_write(jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1)), None, unknown)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_float32_coefficients(dtype):
    """λ is taken in float32 whatever the input: 17² is no bfloat16, and 300 of them are beyond float16."""
    key = jnp.full((1, 1, 1, 300), 17.0, dtype)
    erase, write = erase_and_write(key, jnp.ones((1, 1, 1), dtype))
    assert erase.dtype == write.dtype == accumulator_dtype(key) == jnp.float32
    np.testing.assert_allclose(erase, 1 / 86700, rtol=1e-6)
