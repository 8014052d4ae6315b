"""The train step of a language model: against a step by hand, in parts, on meshes, and that every mixer trains."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModelConfig, graph_of
from efla_jax.models.language_model import MIXERS
from efla_jax.training.config import Config, OptimizerConfig, TrainConfig
from efla_jax.training.loop import make_program
from efla_jax.training.objectives import objective_of
from efla_jax.training.sharding import BATCH, leaf_name
from efla_jax.training.step import initial_state, make_optimizer, make_train_step, parameter_names, schedule
from tests.training.test_sharding import gathered, mesh_of

LENGTH, BATCH_SIZE, VOCAB = 29, 8, 24  # LENGTH is no size of a parameter
MODEL = LanguageModelConfig(
    vocab_size=VOCAB,
    features=16,
    layers=2,
    hidden=20,
    mixers=("efla", "softmax"),
    mixer=MixerConfig(heads=4, key_heads=2, key_dim=4, value_dim=4, conv_width=2, activation=True, initial_gate=0.3),
    attention=AttentionConfig(heads=4, head_dim=4),
    context=64,
)
CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(peak_lr=3e-3, weight_decay=0.1, decayed="matrices", beta2=0.95, clip_norm=0.5),
    train=TrainConfig(steps=3, batch_size=BATCH_SIZE, z_loss=1e-2),
)


def draw(seed=0, batch=BATCH_SIZE):
    """Rows with ever more targets: the first has none, the last one for every token. Two or three documents in each."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, VOCAB, (2, batch, LENGTH))
    targets[rng.random((batch, LENGTH)) >= np.linspace(0, 1, batch)[:, None]] = -1
    ids = np.cumsum(rng.random((batch, LENGTH)) < 0.1, axis=1)
    return {name: x.astype(np.int32) for name, x in dict(inputs=inputs, targets=targets, segment_ids=ids).items()}


@functools.cache
def first_state():
    """Not jitted: what draws parameters is compiled once for all shapes."""
    optimizer = make_optimizer(CONFIG.optimizer, schedule(CONFIG.optimizer, CONFIG.train.steps))
    state = initial_state(CONFIG, jax.random.key(0), optimizer)
    # the embedding and the head larger, so that losses and gates are far from those of no model at all
    enlarge = lambda path, leaf: 10 * leaf if leaf_name(path).startswith(("embed", "head")) else leaf
    return state | dict(params=jax.tree_util.tree_map_with_path(enlarge, state["params"]))


@functools.cache
def compiled(sizes=(1, 1, 1), parts=1):
    """(program, compiled step, sharding of the batch) on a mesh."""
    mesh = mesh_of(*sizes)
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, parts=parts))
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        place = NamedSharding(mesh, BATCH)
        form = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in draw().items()}
        return program, program.step.lower(program.form, form).compile(), place


def placed(program):
    """The first state where the program wants it, copied first: the step donates it. Call outside `jax.set_mesh`."""
    copies = jax.tree.map(jnp.copy, first_state())
    return jax.tree.map(lambda x, form: jax.device_put(x, form.sharding), copies, program.form)


@functools.cache
def trained(sizes=(1, 1, 1), parts=1, steps=3):
    """The state after each step, on the host but for the last, and the metrics."""
    program, step, place = compiled(sizes, parts)
    state, states, metrics = placed(program), [], []
    with jax.set_mesh(program.mesh):
        for number in range(steps):
            state, measured = step(state, jax.device_put(draw(number), place))
            metrics.append(jax.device_get(measured))
            states.append(jax.tree.map(np.asarray, {name: state[name] for name in ("params", "opt_state")}))
    return state, states, metrics


def moments(state):
    """(first, second) moment of AdamW in the order of the parameters."""
    return [jax.tree.leaves(optax.tree.get(state["opt_state"], name)) for name in ("mu", "nu")]


# ---- one step ----


@functools.cache
def by_hand():
    """((minimised, loss), gradient) of the first step: all logits at once, a mean over the targets there are."""
    batch = draw()
    graph = graph_of(MODEL)

    def loss_of(params):
        model = nnx.merge(graph, params)
        logits = model.logits(model(batch["inputs"], segment_ids=batch["segment_ids"])[0])
        valid = batch["targets"] >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(batch["targets"], 0))
        mean = lambda x: jnp.sum(jnp.where(valid, x, 0)) / valid.sum()
        return mean(losses) + 1e-2 * mean(jax.nn.logsumexp(logits, -1) ** 2), mean(losses)

    return jax.device_get(jax.jit(jax.value_and_grad(loss_of, has_aux=True))(first_state()["params"]))


def check_gradient(state, measured):
    """Loss, gradient norm and moments are those of the step by hand."""
    (minimised, loss), gradient = by_hand()
    assert measured["loss"] == pytest.approx(loss, rel=1e-5)  # without the z-loss
    assert minimised > 1.01 * loss
    gradient = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient)]
    norm = math.sqrt(sum(np.sum(leaf**2) for leaf in gradient))
    assert measured["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > CONFIG.optimizer.clip_norm
    for first, second, leaf in zip(*moments(state), gradient, strict=True):
        leaf = leaf * CONFIG.optimizer.clip_norm / norm
        for moment, want in ((first, 0.1 * leaf), (second, 0.05 * leaf**2)):
            np.testing.assert_allclose(moment, want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


def check_update(params, state):
    """AdamW from the step's own moments, as it blows up the rounding of tiny gradients; vectors do not decay."""
    for name, old, new, first, second in zip(
        parameter_names(params), *(jax.tree.leaves(x) for x in (params, state["params"])), *moments(state), strict=True
    ):
        old, first, second = (np.asarray(x, np.float64) for x in (old, first, second))
        decay = 0.0 if name.endswith(("scale", "bias")) else 0.1
        update = first / 0.1 / (np.sqrt(second / 0.05) + 1e-8) + decay * old
        np.testing.assert_allclose(new, old - 3e-3 * update, rtol=1e-5, atol=1e-6, err_msg=name)
    assert {leaf.ndim for leaf in jax.tree.leaves(params)} == {1, 2}


def check_gates(params, measured):
    """Those that have one log it: a mean over the tokens with a target, of the first block's keys, in NumPy."""
    assert [name for name in measured if name.startswith("gate/")] == ["gate/00"]
    batch = draw()
    weights = {
        leaf_name(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    x = weights["embed/embedding"][batch["inputs"]]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * weights["blocks/0/mixer_norm/scale"]
    key, kernel = x @ weights["blocks/0/mixer/key/kernel"], weights["blocks/0/mixer/convolutions/1/kernel"]
    before = np.pad(key[:, :-1], ((0, 0), (1, 0), (0, 0)))
    starts = np.diff(batch["segment_ids"], axis=1, prepend=-1) != 0
    key = key * kernel[0] + np.where(starts[..., None], 0, before) * kernel[1]
    key = (key / (1 + np.exp(-key))).reshape(BATCH_SIZE, LENGTH, 2, 4)
    logit = x @ weights["blocks/0/mixer/beta/kernel"] + weights["blocks/0/mixer/beta/bias"]
    strength = -np.expm1(-np.sum(key**2, -1).repeat(2, axis=-1) / (1 + np.exp(-logit)))
    assert measured["gate/00"] == pytest.approx(strength.mean(-1)[batch["targets"] >= 0].mean(), rel=1e-4)


def test_is_the_step_by_hand():
    """One test for all of it, as its programs take seconds to compile."""
    _, (state, *_), (measured, *_) = trained()
    check_gradient(state, measured)
    check_update(first_state()["params"], state)
    check_gates(first_state()["params"], measured)


def test_a_batch_without_targets_changes_nothing_but_by_decay():
    """It is no division by zero."""
    batch = draw() | dict(targets=np.full((BATCH_SIZE, LENGTH), -1, np.int32))
    program, step, place = compiled()
    state = placed(program)
    with jax.set_mesh(program.mesh):
        _, measured = step(state, jax.device_put(batch, place))
    assert measured["loss"] == measured["grad_norm"] == 0


# ---- in parts ----


@pytest.mark.parametrize("parts", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_in_parts_is_the_batch(parts):
    """The parts have different numbers of targets; a mean of their means would be another number."""
    counts = [np.sum(draw()["targets"][part::parts] >= 0) for part in range(parts)]
    assert max(counts) > 1.2 * min(counts)
    (_, want_states, want), (_, states, got) = trained(), trained(parts=parts)
    assert got[0].keys() == want[0].keys()
    for name in want[0]:
        np.testing.assert_allclose([x[name] for x in got], [x[name] for x in want], rtol=2e-4, atol=1e-7, err_msg=name)
    for leaf, other in zip(*(moments(states[0])[0] for states in (states, want_states)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())


# ---- on a mesh ----

# (sizes, parts). The first gathers parameters over four devices and splits heads; each takes seconds to compile.
MESHES = [((1, 4, 2), 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (((8, 1, 1), 1), ((2, 2, 2), 2)))]


@pytest.mark.parametrize(("sizes", "parts"), MESHES, ids=str)
def test_training_on_a_mesh(sizes, parts):
    """Losses, gradients, gates and parameters are one device's, and what is gathered is parameters alone."""
    program, step, _ = compiled(sizes, parts)
    (want_state, _, want), (state, _, got) = trained(), trained(sizes, parts)
    for name in ("loss", "grad_norm", "leaf_norms", "gate/00"):
        np.testing.assert_allclose([x[name] for x in got], [x[name] for x in want], rtol=1e-4, atol=1e-7)
    for leaf, other in zip(*(jax.tree.leaves(x["params"]) for x in (state, want_state)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4)  # Adam blows up the rounding of tiny gradients
    for leaf, form in zip(jax.tree.leaves(state), jax.tree.leaves(program.form), strict=True):
        assert leaf.sharding.is_equivalent_to(form.sharding, leaf.ndim)
    gathers = gathered(step.as_text())
    largest = max(leaf.size for leaf in jax.tree.leaves(program.form["params"]))
    of_tokens = lambda shape: LENGTH in shape or len(shape) > 2 or math.prod(shape) > largest
    assert [shape for shape in gathers if of_tokens(shape)] == []
    assert bool(gathers) == (sizes[1] > 1)  # fsdp does gather parameters: the search finds what there is


# ---- every mixer ----


def falls(config, steps=30):
    """Losses on one batch that is shown again and again, and the gradient norms of the first step by name."""
    optimizer = make_optimizer(config.optimizer, config.optimizer.peak_lr)
    state = initial_state(config, jax.random.key(1), optimizer)
    rate = optax.constant_schedule(config.optimizer.peak_lr)
    step = jax.jit(make_train_step(graph_of(config.model), optimizer, rate, objective=objective_of(config)))
    losses, norms = [], None
    for _ in range(steps):
        state, measured = step(state, draw(batch=2))
        losses.append(float(measured["loss"]))
        norms = measured["leaf_norms"] if norms is None else norms
    return losses, dict(zip(parameter_names(state["params"]), np.asarray(norms), strict=True))


def of_mixers(*mixers):
    model = dataclasses.replace(
        MODEL, layers=len(mixers), mixers=mixers, mixer=dataclasses.replace(MODEL.mixer, initial_gate=0)
    )
    return Config(model=model, optimizer=OptimizerConfig(peak_lr=1e-2), train=TrainConfig(batch_size=2))


KINDS = ("gated_efla", "v4_deltanet", "softmax", "sliding_window")  # with all that the other names have


def test_a_model_of_every_kind_of_mixer_trains():
    """Each parameter of each mixer has a gradient, and what it can remember of one batch it does."""
    losses, norms = falls(of_mixers(*KINDS))
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.1)
    assert losses[-1] < losses[0] / 2
    assert [name for name, norm in norms.items() if not norm > 0] == []
    assert {name.split("/")[1] for name in norms if "mixer/" in name} == {str(number) for number in range(len(KINDS))}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_each_mixer_trains(mixer):
    losses, norms = falls(of_mixers(mixer))
    assert losses[-1] < losses[0] / 2
    assert all(norm > 0 for norm in norms.values())
