"""The train step and what it is made of: schedule, optimizer, metrics, randomness, vmap, donation."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efla_jax.layers import MixerConfig
from efla_jax.models import ClassifierConfig, graph_of
from efla_jax.training.config import Config, OptimizerConfig, TrainConfig
from efla_jax.training.objectives import classification_sums
from efla_jax.training.step import (
    initial_state,
    make_optimizer,
    make_train_step,
    parameter_names,
    schedule,
)

MODEL = ClassifierConfig(
    pixels=16,
    pixels_per_token=4,
    features=8,
    layers=1,
    hidden=12,
    dropout=0.3,
    mixer=MixerConfig(heads=2, key_dim=3, value_dim=4),
)
CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2, clip_norm=0.5),
    train=TrainConfig(steps=6, batch_size=5),
)
GRAPH = graph_of(MODEL)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return dict(image=rng.integers(0, 256, (5, 4, 4)).astype(np.uint8), label=rng.integers(0, 10, 5).astype(np.int32))


@functools.cache
def program(config=CONFIG):
    """(seed -> state, step): both jitted, nothing donated."""
    learning_rate = schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, learning_rate)
    start = jax.jit(lambda seed: initial_state(config, jax.random.key(seed), optimizer))
    return start, jax.jit(make_train_step(graph_of(config.model), optimizer, learning_rate))


@functools.cache
def trained(steps=3):
    """States and metrics of the first steps, from seed 0."""
    start, step = program()
    states, metrics = [start(0)], []
    for number in range(steps):
        state, measured = step(states[-1], draw(number))
        states.append(state)
        metrics.append(jax.device_get(measured))
    return states, metrics


# ---- schedule and optimizer ----


def rates(steps, at, **options):
    return [float(np.asarray(schedule(OptimizerConfig(**options), steps)(step))) for step in at]


def test_constant_schedule():
    assert rates(10, (0, 5, 100), peak_lr=0.5) == [0.5] * 3
    np.testing.assert_allclose(rates(10, range(7), peak_lr=0.4, warmup_steps=4), [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_schedule():
    cosine = lambda step, begin, end: 0.1 + (1 - 0.1) * (1 + math.cos(math.pi * (step - begin) / (end - begin))) / 2
    options = dict(peak_lr=1.0, schedule="cosine", end_lr=0.1)
    np.testing.assert_allclose(rates(20, range(21), **options), [cosine(t, 0, 20) for t in range(21)], rtol=1e-5)
    want = [t / 4 for t in range(4)] + [cosine(t, 4, 20) for t in range(4, 21)] + [0.1]
    np.testing.assert_allclose(rates(20, range(22), **options, warmup_steps=4), want, rtol=1e-5)


def test_warm_up_may_start_above_zero():
    options = dict(peak_lr=1.0, start_lr=0.2, warmup_steps=4)
    np.testing.assert_allclose(rates(20, range(6), **options), [0.2, 0.4, 0.6, 0.8, 1, 1], rtol=1e-6)


def test_degenerate_schedules():
    assert rates(5, (0, 3), peak_lr=0.0, schedule="cosine") == [0, 0]
    assert rates(3, (3, 4), peak_lr=1.0, schedule="cosine", warmup_steps=3)[0] == 1.0  # all of it is warm-up


def first_update(gradient, params, **options):
    optimizer = make_optimizer(OptimizerConfig(**options), 0.1)
    gradient, params = jnp.asarray(gradient), jnp.asarray(params)
    return np.asarray(optimizer.update(gradient, optimizer.init(params), params)[0])


def test_adamw_decays_weights_apart_from_the_gradient():
    """The first update of AdamW is lr (sign of the gradient + decay · weight)."""
    gradient, params = np.array([3.0, -4.0, 1e-3]), np.array([1.0, 2.0, -4.0])
    got = first_update(gradient, params, weight_decay=0.2, clip_norm=0)
    np.testing.assert_allclose(got, -0.1 * (np.sign(gradient) + 0.2 * params), rtol=1e-4)
    np.testing.assert_allclose(
        first_update(gradient, params, weight_decay=0, clip_norm=0), -0.1 * np.sign(gradient), rtol=1e-4
    )


def test_decay_may_be_of_matrices_alone():
    params = {"matrix": jnp.full((2, 2), 3.0), "vector": jnp.full(2, 3.0)}
    for decayed, vector in (("all", -0.1 * 0.2 * 3), ("matrices", 0.0)):
        optimizer = make_optimizer(OptimizerConfig(weight_decay=0.2, decayed=decayed), 0.1)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates: Any = optimizer.update(zeros, optimizer.init(params), params)[0]
        np.testing.assert_allclose(updates["matrix"], -0.1 * 0.2 * 3, rtol=1e-6)
        np.testing.assert_allclose(updates["vector"], vector, rtol=1e-6)


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 0.2), (5.0, 1.0), (10.0, 1.0), (0.0, 1.0)])
def test_the_whole_gradient_is_clipped(clip, scale):
    """Seen in the moments: the norm over all leaves, 5, decides, not each leaf's own."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=clip), 0.1)
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose([mu["a"][0], mu["b"][0]], 0.1 * scale * np.array([3.0, 4.0]), rtol=1e-6)


def test_betas_are_those_of_the_config():
    optimizer = make_optimizer(OptimizerConfig(beta1=0.5, beta2=0.75, clip_norm=0), 0.1)
    gradient = jnp.array([2.0])
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    assert optax.tree.get(state, "mu")[0] == 1.0
    assert optax.tree.get(state, "nu")[0] == 1.0


# ---- the step ----


def means(params, batch, key=None):
    """(loss, accuracy), means over the batch."""
    loss, sums = classification_sums(GRAPH, params, batch, dropout_key=key)
    count = len(batch["label"])
    return loss / count, sums["accuracy"] / count


def by_hand(state, batch):
    """Loss, accuracy and gradient of the step that starts from this state."""
    loss_of = lambda params: means(params, batch, jax.random.fold_in(state["key"], state["step"]))
    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(state["params"])


def test_loss_is_cross_entropy_of_the_model():
    params, batch = trained()[0][0]["params"], jax.tree.map(jnp.asarray, draw())
    measure = lambda params: (means(params, batch), nnx.merge(GRAPH, params)(batch["image"]))
    (loss, accuracy), logits = jax.tree.map(np.float64, jax.jit(measure)(params))
    log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert float(loss) == pytest.approx(-log_probability[np.arange(5), batch["label"]].mean(), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(logits.argmax(axis=1) == batch["label"]))


def test_metrics_are_of_the_state_that_came_in():
    states, metrics = trained()
    assert [int(state["step"]) for state in states] == [0, 1, 2, 3]
    np.testing.assert_allclose([x["learning_rate"] for x in metrics], [0, 5e-3, 1e-2], rtol=1e-6)
    for number, (state, measured) in enumerate(zip(states, metrics, strict=False)):
        (loss, accuracy), gradient = by_hand(state, draw(number))
        norms = [np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(gradient)]
        assert measured["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert measured["accuracy"] == pytest.approx(float(accuracy))
        assert measured["grad_norm"] == pytest.approx(math.sqrt(sum(norms)), rel=1e-4)  # before clipping
        np.testing.assert_allclose(measured["leaf_norms"], norms, rtol=1e-3, atol=1e-9)
    assert max(x["grad_norm"] for x in metrics) > CONFIG.optimizer.clip_norm


def test_update_is_the_optimizers():
    states, _ = trained()
    optimizer = make_optimizer(CONFIG.optimizer, schedule(CONFIG.optimizer, CONFIG.train.steps))
    _, gradient = by_hand(states[1], draw(1))
    updates, _ = jax.jit(optimizer.update)(gradient, states[1]["opt_state"], states[1]["params"])
    want = optax.apply_updates(states[1]["params"], updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), states[2]["params"], want)


def test_leaf_norms_are_in_the_order_of_the_names():
    """Each place holds the norm of the gradient that its name leads to."""
    (state, *_), (measured, *_) = trained()
    names = parameter_names(state["params"])
    assert len(set(names)) == len(names) == len(measured["leaf_norms"])
    gradient = jax.device_get(by_hand(state, draw(0))[1])
    for path, norm in zip(names, measured["leaf_norms"], strict=True):
        leaf = gradient
        for part in path.split("/"):
            leaf = leaf[int(part) if part.isdigit() else part]
        assert float(norm) == pytest.approx(float(np.sum(leaf[...] ** 2)), rel=1e-3, abs=1e-9)
    assert "blocks/0/mixer/key/kernel" in names


def test_dropout_is_drawn_anew_each_step():
    """From the key and the step alone: a step done again is the same, bit for bit."""
    _, step = program()
    (state, *_), (measured, *_) = trained()
    again, later = step(state, draw(0))[1], step(state | {"step": jnp.int32(1)}, draw(0))[1]
    assert again["loss"] == measured["loss"]
    assert later["loss"] != measured["loss"]


def test_the_key_is_split_between_parameters_and_training():
    start, _ = program()
    state, other = start(0), start(1)
    assert jax.random.key_data(state["key"]).tolist() != jax.random.key_data(other["key"]).tolist()
    assert jax.random.key_data(state["key"]).tolist() != jax.random.key_data(jax.random.key(0)).tolist()
    assert np.any(state["params"]["embed"]["kernel"][...] != other["params"]["embed"]["kernel"][...])
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), state["opt_state"])


def test_vmapped_over_seeds_is_one_run_per_seed():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dropout=0.0))
    start, step = program(config)
    states = [start(seed) for seed in (0, 1)]
    stack = lambda *x: jnp.stack(x)
    together, vmapped = jax.tree.map(stack, *states), jax.jit(jax.vmap(step))
    for number in range(3):
        batches = [draw(10 * number + seed) for seed in (0, 1)]
        together, metrics = vmapped(together, jax.tree.map(stack, *batches))
        states, alone = zip(*(step(state, batch) for state, batch in zip(states, batches, strict=True)), strict=True)
        np.testing.assert_allclose(metrics["loss"], [x["loss"] for x in alone], rtol=1e-4)
        np.testing.assert_allclose(metrics["leaf_norms"], [x["leaf_norms"] for x in alone], rtol=1e-2, atol=1e-6)
    assert abs(alone[0]["loss"] - alone[1]["loss"]) > 1e-3


def test_donation_changes_no_bit():
    learning_rate = schedule(CONFIG.optimizer, CONFIG.train.steps)
    step = make_train_step(GRAPH, make_optimizer(CONFIG.optimizer, learning_rate), learning_rate)
    donating, state = jax.jit(step, donate_argnums=0), program()[0](0)
    for number in range(3):
        given = state
        state, _ = donating(given, draw(number))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given["params"]))
    want = trained()[0][-1]
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for leaf, other in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(want["params"]), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_a_model_with_other_variables_than_parameters_is_refused(monkeypatch):
    """What is no parameter would neither be trained nor saved."""
    make = lambda config, rngs: nnx.BatchNorm(config.features, rngs=rngs)
    monkeypatch.setattr("efla_jax.models.build", make)
    with pytest.raises(ValueError, match="filters"):
        graph_of(MODEL)
