"""The chunked cross-entropy: against optax in float64, in bfloat16, on a split vocabulary, and what it never holds."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from efla_jax.models.cross_entropy import summed_loss, token_losses

BATCH, LENGTH, FEATURES, VOCAB = 3, 10, 5, 17
Z_LOSS = 0.3
SCALE = 1.496  # of the objective: bfloat16 would round it by 2.5e-3, to 1.4921875


@functools.cache
def draw(seed=0):
    """hidden [B, T, E], kernel [E, V], targets [B, T] of which some are ignored, one row altogether."""
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.normal(size=(BATCH, LENGTH, FEATURES)), rng.normal(size=(FEATURES, VOCAB))
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    targets[0, :4], targets[1, -1], targets[2] = -1, -1, -1
    return hidden, kernel, targets


def plain(hidden, kernel, targets, z_loss, dtype=None):
    """(objective, loss) with all logits at once."""
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype)
    valid = targets >= 0
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, targets, 0))
    total = jnp.sum(jnp.where(valid, loss, 0))
    return total + z_loss * jnp.sum(jnp.where(valid, jax.nn.logsumexp(logits, -1) ** 2, 0)), total


def with_gradients(loss_of, hidden, kernel, targets):
    """(objective, loss), and the gradients of SCALE · objective."""
    scaled = lambda hidden, kernel: (lambda out: (SCALE * out[0], out))(loss_of(hidden, kernel, targets))
    gradients, out = jax.jit(jax.grad(scaled, (0, 1), has_aux=True))(hidden, kernel)
    return out, gradients


@functools.cache
def reference(z_loss=Z_LOSS):
    with jax.enable_x64(True):
        hidden, kernel, targets = draw()
        return jax.device_get(with_gradients(lambda *x: plain(*x, z_loss=z_loss), hidden, kernel, targets))


@pytest.mark.parametrize("chunk", [None, 1, 4, LENGTH, 64])
def test_is_that_of_optax_for_any_chunk(chunk):
    with jax.enable_x64(True):
        hidden, kernel, targets = (jnp.asarray(x) for x in draw())
        got = with_gradients(lambda *x: summed_loss(*x, Z_LOSS, chunk), hidden, kernel, targets)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), got, reference())
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float64")}
    assert not np.any(np.asarray(got[1][0])[np.asarray(targets) < 0])  # nothing flows from a target of -1


def test_value_without_gradient_and_without_z_loss():
    """The undifferentiated call is other code than the differentiated one."""
    with jax.enable_x64(True):
        hidden, kernel, targets = (jnp.asarray(x) for x in draw())
        got = jax.jit(lambda *x: summed_loss(*x, Z_LOSS, 4))(hidden, kernel, targets)
        np.testing.assert_allclose(got, reference()[0], rtol=1e-12)
        objective, loss = jax.jit(lambda *x: summed_loss(*x, chunk=4))(hidden, kernel, targets)
        assert objective == loss
        np.testing.assert_allclose(loss, reference()[0][1], rtol=1e-12)


@pytest.mark.parametrize("chunk", [None, 3, LENGTH])
def test_losses_of_tokens(chunk):
    hidden, kernel, targets = draw()
    logits = hidden @ kernel
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    run = jax.jit(lambda *x: token_losses(*x, chunk=chunk))
    got = run(jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32), targets)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.where(targets >= 0, want, 0), rtol=1e-5, atol=1e-5)


def test_large_logits_are_finite():
    hidden, kernel, targets = draw()
    hidden, kernel = jnp.asarray(1e3 * hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
    out, gradients = with_gradients(lambda *x: summed_loss(*x, 0.0, 4), hidden, kernel, targets)
    want, _ = jax.jit(lambda *x: plain(*x, z_loss=0.0))(hidden, kernel, targets)
    np.testing.assert_allclose(out[0], want, rtol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in gradients)


# ---- bfloat16 ----


@functools.cache
def in_bfloat16():
    """(exact, plain, chunked) of the same rounded inputs; larger, so that errors are means over many draws."""
    rng = np.random.default_rng(1)
    hidden, kernel = rng.normal(size=(4, 32, 64)), rng.normal(size=(64, 128)) / 4
    targets = rng.integers(-1, 128, (4, 32)).astype(np.int32)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float64)
    with jax.enable_x64(True):
        exact = with_gradients(lambda *x: plain(*x, z_loss=0.1), np.asarray(hidden, np.float64), rounded, targets)
    kernel = jnp.asarray(rounded, jnp.float32)
    whole = with_gradients(lambda *x: plain(*x, z_loss=0.1, dtype=jnp.float32), hidden, kernel, targets)
    chunked = with_gradients(lambda *x: summed_loss(*x, 0.1, 5), hidden, kernel, targets)
    return [jax.tree.map(lambda x: np.asarray(x, np.float64), x) for x in (exact, whole, chunked)] + [chunked]


def test_bfloat16_errs_as_plain_bfloat16_does():
    """float32 logits of bfloat16 factors: at most 1.5 times the error of all logits at once."""
    exact, whole, chunked, arrays = in_bfloat16()
    assert [x.dtype for x in jax.tree.leaves(arrays)] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    error = lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(y)
    for got, other, want in zip(*(jax.tree.leaves(x) for x in (chunked, whole, exact)), strict=True):
        # 2^-9 is the rounding of one number; below it the plain form's error is no measure
        assert error(got, want) <= max(1.5 * error(other, want), 2**-9)
    np.testing.assert_allclose(chunked[0], exact[0], rtol=1e-5)  # the loss is a sum in float32


def test_both_bfloat16_gradients_are_scaled_alike():
    """The cotangent, one over the number of targets in training, must not be rounded to bfloat16 for one of them."""
    exact, _, chunked, _ = in_bfloat16()
    for got, want in zip(chunked[1], exact[1], strict=True):
        assert np.vdot(got, want) / np.vdot(want, want) == pytest.approx(1, abs=1e-3)  # rounded, it is off by 2.5e-3


# ---- what the compiled program holds ----


def sizes(text) -> list[int]:
    """Elements of every array in an HLO text."""
    return [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\d+\[([\d,]+)\]", text)]


@functools.cache
def compiled_text(loss_of):
    hidden, kernel, targets = draw()
    scaled = lambda hidden, kernel: loss_of(hidden, kernel, targets)[0]
    form = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel)]
    return jax.jit(jax.value_and_grad(scaled, (0, 1))).lower(*form).compile().as_text()


def test_all_logits_are_never_held():
    """Nothing in the program, forward and backward, is as large as [B, T, V]; with all logits at once something is."""
    whole = BATCH * LENGTH * VOCAB
    assert max(sizes(compiled_text(lambda *x: plain(*x, z_loss=Z_LOSS)))) >= whole
    assert max(sizes(compiled_text(lambda *x: summed_loss(*x, Z_LOSS, 4)))) == BATCH * 4 * VOCAB


def test_a_vocabulary_split_over_devices_stays_so():
    """Rows over one axis, the vocabulary over the other: the same numbers, and neither is gathered."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(2)
    hidden, kernel = rng.normal(size=(4, LENGTH, FEATURES)), rng.normal(size=(FEATURES, 24))
    targets = rng.integers(-1, 24, (4, LENGTH)).astype(np.int32)
    specs = (P("data"), P(None, "tensor"), P("data"))
    loss_of = lambda *x: (lambda out: (out[0], out))(summed_loss(*x, Z_LOSS, 4))
    run = jax.jit(jax.grad(loss_of, (0, 1), has_aux=True))
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(jnp.asarray(x, x.dtype if x.dtype == np.int32 else jnp.float32), NamedSharding(mesh, spec))
            for x, spec in zip((hidden, kernel, targets), specs, strict=True)
        ]
        program = run.lower(*arrays).compile()
        gradients, out = program(*arrays)
    with jax.enable_x64(True):
        want, want_out = run(hidden, kernel, targets)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), (gradients, out), (want, want_out)
    )
    assert gradients[1].sharding.is_equivalent_to(NamedSharding(mesh, specs[1]), 2)
    text = program.as_text() or ""
    assert re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text) == []
    assert re.findall(r" all-reduce(?:-start)?\(", text)  # sums over the vocabulary and the rows
