"""Erase and write coefficients of every integrator: the equation, and the only place that knows the rule.

The state of one head obeys dS/dt = -(γI + β k kᵀ) S + β k vᵀ over one unit of time (EFLA, arXiv 2512.12602, with a
log-decay g = -γ). Every integrator turns it into S_t = e^g (I - erase k kᵀ) S_{t-1} + write k vᵀ; what follows
downstream (scan, chunkwise form, kernels) sees the two numbers per token and nothing else.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efla_jax.choices import check_choice

Integrator = Literal["exact", "split", "euler", "rk2", "rk4", "implicit"]
INTEGRATORS: tuple[str, ...] = get_args(Integrator)

# φ₁'(x) = -Σ (n+1)(-x)ⁿ/(n+2)!. Below the border its closed form cancels; 16 terms are exact to float64 there.
_SERIES_BORDER = 0.5
_SERIES = [-1.0 / 2.0]
for _n in range(1, 16):
    _SERIES.append(-_SERIES[-1] * (_n + 1) / (_n * (_n + 2)))


def _phi1(x: Array) -> Array:
    """φ₁(x) = (1 - e^{-x})/x for x ≥ 0, with φ₁(0) = 1."""
    nonzero = jnp.where(x == 0, 1.0, x)
    return jnp.where(x == 0, 1.0, -jnp.expm1(-nonzero) / nonzero)


def _phi1_slope(x: Array) -> Array:
    """φ₁'(x) = (e^{-x} - φ₁(x))/x, by its series near 0."""
    far = jnp.where(x < _SERIES_BORDER, 1.0, x)
    near = jnp.where(x < _SERIES_BORDER, x, 0.0)
    # by hand: jnp.polyval is a loop that refuses arrays split on Explicit axes
    series = functools.reduce(lambda tail, term: tail * near + term, reversed(_SERIES))
    return jnp.where(x < _SERIES_BORDER, series, (jnp.exp(-far) - _phi1(far)) / far)


@jax.custom_jvp
def exact_gain(beta: Array, lam: Array, gamma: Array) -> Array:
    """β (1 - e^{-(γ+βλ)}) / (γ+βλ): the exact write; with γ = 0 the exact erase (1 - e^{-βλ})/λ.

    Value and derivatives are finite and accurate at λ = 0, β = 0 and for any large βλ.
    """
    return beta * _phi1(gamma + beta * lam)


@exact_gain.defjvp
def _exact_gain_jvp(primals, tangents):
    beta, lam, gamma = primals
    x = gamma + beta * lam
    slope = _phi1_slope(x)
    # ∂β is φ₁ + βλφ₁' rewritten so that nothing cancels: both terms are positive.
    d_beta = jnp.exp(-x) - gamma * slope
    tangent = d_beta * tangents[0] + beta * slope * (beta * tangents[1] + tangents[2])
    return beta * _phi1(x), tangent


def accumulator_dtype(*arrays: Array) -> jnp.dtype:
    """float64 when any of the arrays is (and JAX has it on), else float32: the type of λ, coefficients, state, sums."""
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jax.dtypes.canonicalize_dtype(jnp.float64 if wide else jnp.float32)


def erase_and_write(
    key: Float[Array, "*n Hk K"],
    beta: Float[Array, "*n H"],
    log_decay: Float[Array, "*n H"] | None = None,
    integrator: Integrator = "exact",
) -> tuple[Float[Array, "*n H"], Float[Array, "*n H"]]:
    """Coefficients (erase, write) of one step of length one, in float32 (float64 for float64 inputs).

    With x = βλ, λ = ‖k‖², γ = -log_decay:
    exact: erase (1 - e^{-x})/λ, write β(1 - e^{-(γ+x)})/(γ+x), decay and rank-one term integrated together.
    Every other one decays exactly, then steps, so that write = erase: split (1 - e^{-x})/λ; euler β (DeltaNet on
    unit keys); rk2 β(1 - x/2); rk4 β(1 - x/2 + x²/6 - x³/24); implicit β/(1 + x) (backward Euler, Longhorn).
    """
    dtype = accumulator_dtype(key, beta)
    key, beta = key.astype(dtype), beta.astype(dtype)
    check_choice("integrator", integrator, INTEGRATORS)
    if integrator == "euler":
        return beta, beta
    lam = jnp.sum(key * key, axis=-1)
    groups = beta.shape[-1] // max(lam.shape[-1], 1)
    if groups > 1:  # not jnp.repeat, which refuses heads that an Explicit mesh splits
        lam = jnp.broadcast_to(lam[..., None], (*lam.shape, groups)).reshape(beta.shape)
    zero = jnp.zeros_like(beta)
    if integrator == "exact" and log_decay is not None:
        return exact_gain(beta, lam, zero), exact_gain(beta, lam, -log_decay.astype(dtype))
    x = beta * lam
    if integrator in ("exact", "split"):
        gain = exact_gain(beta, lam, zero)
    elif integrator == "rk2":
        gain = beta * (1 - x / 2)
    elif integrator == "rk4":
        gain = beta * (1 - x / 2 + x**2 / 6 - x**3 / 24)
    else:  # implicit
        gain = beta / (1 + x)
    return gain, gain
