"""The mesh, where the leaves of real states lie on it, and that training on any mesh is the same training."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import ClassifierConfig, LanguageModelConfig, LastStateConfig
from efla_jax.training.config import Config, ConfigError, MeshConfig, OptimizerConfig
from efla_jax.training.loop import make_program
from efla_jax.training.sharding import AXES, BATCH, leaf_name, make_mesh, state_shardings
from efla_jax.training.step import initial_state, make_optimizer

TOKENS, FEATURES, BATCH_SIZE = 37, 16, 8
MIXER = MixerConfig(heads=4, key_heads=2, key_dim=4, value_dim=4, conv_width=2, output_gate=True)
MODEL = ClassifierConfig(
    pixels=2 * TOKENS, pixels_per_token=2, features=FEATURES, layers=1, hidden=24, dropout=0.1, mixer=MIXER
)
CONFIG = Config(model=MODEL, optimizer=OptimizerConfig(peak_lr=3e-3))


def mesh_of(*sizes) -> Mesh:
    """Of the first devices, as many as it takes."""
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


# ---- the mesh ----


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=4, fsdp=2, tensor=-1), (4, 2, 1)),
    ],
)
def test_mesh_covers_all_devices(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(2, 1, 1), (16, 1, 1), (3, -1, 1), (-1, 16, 1), (3, 3, 1)])
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"config.mesh is \[.*\] over .*; the sizes must multiply to the 8 devices"):
        make_mesh(MeshConfig(*sizes))


# ---- the table of rules ----


def specs(config, mesh) -> dict[str, tuple]:
    """Axes of every leaf of the state by name, those that are whole left out."""
    optimizer = make_optimizer(config.optimizer, 1e-3)
    form = jax.eval_shape(lambda: initial_state(config, jax.random.key(0), optimizer))
    leaves = jax.tree_util.tree_flatten_with_path(state_shardings(mesh, form))[0]
    assert {type(place) for _, place in leaves} == {NamedSharding}
    return {leaf_name(path): tuple(place.spec) for path, place in leaves if any(place.spec)}


CLASSIFIER_SPECS = {
    "embed/kernel": (None, "fsdp"),
    "position": (None, "fsdp"),
    "blocks/0/mixer/query/kernel": ("fsdp", "tensor"),
    "blocks/0/mixer/key/kernel": ("fsdp", "tensor"),
    "blocks/0/mixer/value/kernel": ("fsdp", "tensor"),
    "blocks/0/mixer/beta/kernel": ("fsdp", "tensor"),
    "blocks/0/mixer/gate/kernel": ("fsdp", "tensor"),
    "blocks/0/mixer/out/kernel": ("tensor", "fsdp"),
    "blocks/0/mlp/gate/kernel": ("fsdp", "tensor"),
    "blocks/0/mlp/up/kernel": ("fsdp", "tensor"),
    "blocks/0/mlp/down/kernel": ("tensor", "fsdp"),
    "head/kernel": ("fsdp", "tensor"),
}
LAST_STATE_SPECS = {
    "embed/kernel": (None, "fsdp"),
    "position": (None, "fsdp"),
    **{f"{name}/kernel": ("fsdp", "tensor") for name in ("query", "key", "value")},
    "beta/kernel": ("fsdp", None),  # one head
    "head/kernel": ("fsdp", "tensor"),
}
LANGUAGE_MODEL = LanguageModelConfig(
    features=16, layers=2, mixers=("v4_efla", "softmax"), mixer=MIXER, attention=AttentionConfig(heads=2, head_dim=4)
)
_SPLIT = {True: ("fsdp", "tensor"), False: ("tensor", "fsdp")}  # what makes heads or hidden units, what takes them
LANGUAGE_MODEL_SPECS = {
    "embed/embedding": (None, "fsdp"),  # 257 tokens, which two devices cannot share
    **{
        f"blocks/0/mixer/{name}/kernel": _SPLIT[name != "out"]
        for name in ("query", "key", "value", "beta", "gate", "out")
    },
    "blocks/0/mixer/decay/kernel": ("fsdp", "tensor"),
    **{f"blocks/1/mixer/{name}/kernel": _SPLIT[name != "out"] for name in ("query", "key", "value", "out")},
    **{
        f"blocks/{block}/mlp/{name}/kernel": _SPLIT[name != "down"] for block in "01" for name in ("gate", "up", "down")
    },
    "head/kernel": ("fsdp", None),
}


@pytest.mark.parametrize(
    ("model", "want"),
    [(MODEL, CLASSIFIER_SPECS), (LastStateConfig(), LAST_STATE_SPECS), (LANGUAGE_MODEL, LANGUAGE_MODEL_SPECS)],
    ids=["stack", "last state", "language model"],
)
def test_parameters_and_their_moments_follow_the_rules(model, want):
    """What is not named, such as norms, biases, counters and the key, is replicated."""
    prefixes = ("params", "opt_state/1/0/mu", "opt_state/1/0/nu")
    everything = {f"{prefix}/{name}": spec for prefix in prefixes for name, spec in want.items()}
    assert specs(Config(model=model), mesh_of(2, 2, 2)) == everything


def test_axes_that_do_not_divide_stay_whole():
    mesh = mesh_of(1, 4, 2)
    shapes = {
        "a/query/kernel": (8, 6),
        "b/query/kernel": (6, 6),
        "c/query/kernel": (8, 5),
        "d/query/kernel": (8, 6, 2),  # of another rank than the rule
        "my_query/kernel": (8, 6),  # of another name
    }
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    got = {name: tuple(place.spec) for name, place in state_shardings(mesh, state).items()}
    assert got == {
        "a/query/kernel": ("fsdp", "tensor"),
        "b/query/kernel": (None, "tensor"),
        "c/query/kernel": ("fsdp", None),
        "d/query/kernel": (),
        "my_query/kernel": (),
    }


# ---- training on a mesh ----


@functools.cache
def compiled(sizes):
    """(program, compiled step, batch form) on a mesh."""
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        program = make_program(CONFIG, mesh)
        place = NamedSharding(mesh, BATCH)
        batch = dict(
            image=jax.ShapeDtypeStruct((BATCH_SIZE, 2 * TOKENS), jnp.uint8, sharding=place),
            label=jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.int32, sharding=place),
        )
        return program, program.step.lower(program.form, batch).compile(), batch


@functools.cache
def trained(sizes, steps=3):
    """Losses, gradient norms and final parameters."""
    rng = np.random.default_rng(0)
    program, step, form = compiled(sizes)
    with jax.set_mesh(program.mesh):
        state, metrics = program.start(), []
        for _ in range(steps):
            draw = dict(image=rng.integers(0, 256, form["image"].shape), label=rng.integers(0, 10, BATCH_SIZE))
            batch = {name: jax.device_put(draw[name].astype(x.dtype), x.sharding) for name, x in form.items()}
            state, measured = step(state, batch)
            metrics.append(jax.device_get(measured))
    return state, metrics


def gathered(text) -> set[tuple[int, ...]]:
    """Shapes of all that the program gathers or exchanges, from its HLO text."""
    results = re.findall(r"= (.+?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    shapes = re.findall(r"\w\d+\[([\d,]*)\]", " ".join(results))
    return {tuple(int(size) for size in shape.split(",") if size) for shape in shapes}


def of_tokens(shapes) -> list[tuple[int, ...]]:
    """Those that hold something of every token: [..., T, ...] or, in chunks, something as large."""
    positions = (TOKENS, FEATURES)  # a parameter
    large = lambda shape: len(shape) > 2 and math.prod(shape) > TOKENS
    return [shape for shape in shapes if shape != positions and (TOKENS in shape or large(shape))]


def test_a_gather_of_activations_would_be_found():
    mesh = mesh_of(2, 2, 2)
    x = jax.ShapeDtypeStruct(
        (BATCH_SIZE, TOKENS, 4, 4), jnp.float32, sharding=NamedSharding(mesh, P("data", None, "tensor"))
    )
    whole = jax.jit(lambda x: 2 * x, out_shardings=NamedSharding(mesh, P()))
    assert of_tokens(gathered(whole.lower(x).compile().as_text()))


SLOW = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (1, 4, 2))]


@pytest.mark.parametrize("sizes", [(2, 2, 2), *SLOW], ids=str)
def test_training_on_a_mesh(sizes):
    """One test per mesh for three guarantees, as its program takes seconds to compile."""
    program, step, _ = compiled(sizes)
    (want_state, want), (state, got) = trained((1, 1, 1)), trained(sizes)
    # the same training as on one device, to float32 rounding; dropout masks do not depend on the mesh
    for name in ("loss", "grad_norm", "leaf_norms"):
        np.testing.assert_allclose([x[name] for x in got], [x[name] for x in want], rtol=1e-4, atol=1e-7)
    assert abs(want[0]["loss"] - want[-1]["loss"]) > 1e-3
    for leaf, other in zip(*(jax.tree.leaves(x["params"]) for x in (state, want_state)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4)  # Adam blows up the rounding of tiny gradients
    # the state stays where the rules put it
    for leaf, form in zip(jax.tree.leaves(state), jax.tree.leaves(program.form), strict=True):
        assert leaf.sharding.is_equivalent_to(form.sharding, leaf.ndim)
    # forward and backward, what is gathered is parameters, and what there is one of per digit behind the mean
    gathers = gathered(step.as_text())
    assert of_tokens(gathers) == []
    assert bool(gathers) == (sizes[1] > 1)  # fsdp does gather parameters: the search finds what there is
