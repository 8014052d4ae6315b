"""Under vmap, remat, shard_map and on sharded arrays the kernels give the bits that they give alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efla_jax import efla_attention
from tests.pallas_kernels.hopper.helpers import documents, rounded

interpreted = pytest.mark.usefixtures("interpreted")
on_devices = pytest.mark.usefixtures("on_devices")
several = pytest.mark.cpu("needs several devices")

BATCH, LENGTH, HEADS = 2, 65, 2
SPEC = PartitionSpec("data", None, "tensor")


@pytest.fixture
def attend(implementation):
    """The op by the kernels, of inputs as one dictionary."""
    return functools.partial(_attend, implementation)


def _attend(implementation, inputs, **options):
    return efla_attention(**inputs, implementation=implementation, **options)


def both(op, inputs):
    """(output, state) and the gradients of the floating inputs, of which some need the output again.

    One forward and one backward pass: on several devices the interpreter confuses kernels that do not wait for each
    other.
    """
    floats = {name: x for name, x in inputs.items() if name != "segment_ids"}
    out, pullback = jax.vjp(lambda floats: op(inputs | floats), floats)
    return out, pullback(jax.tree.map(jnp.cos, out))[0]


def inputs_of():
    inputs, _ = rounded(batch=BATCH, length=LENGTH, heads=HEADS, key_heads=HEADS)
    return inputs | dict(segment_ids=documents((30,), BATCH, LENGTH))


@pytest.fixture
def alone(implementation):
    """alone(): what the kernels give without any transformation."""
    return functools.partial(_alone, implementation)


@functools.cache
def _alone(implementation):
    op = functools.partial(_attend, implementation)
    return jax.tree.map(np.asarray, jax.jit(lambda x: both(op, x))(inputs_of()))


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


@interpreted
def test_vmap(attend, alone):
    """Over the rows of every input."""
    inputs = {name: x[:, None] for name, x in inputs_of().items()}
    got = jax.jit(jax.vmap(lambda x: both(attend, x)))(inputs)
    assert_same(jax.tree.map(lambda x: x[:, 0], got), alone())


@pytest.mark.slow
@interpreted
def test_vmap_over_some(attend):
    """The rest is shared, as parameters are."""
    inputs = inputs_of()
    shared = {name: x[:1] for name, x in inputs.items()}
    call = lambda value: attend(shared | dict(value=value))[0]
    got = jax.jit(jax.vmap(call))(inputs["value"][:, None])
    whole = {name: np.repeat(x, BATCH, 0) for name, x in shared.items()} | dict(value=inputs["value"])
    assert_same(got[:, 0], jax.jit(lambda x: attend(x)[0])(whole))


@interpreted
@pytest.mark.parametrize(
    "names", [(), pytest.param(("efla_output", "efla_residuals"), marks=pytest.mark.slow)], ids=["recomputed", "saved"]
)
def test_remat(attend, alone, names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    got = jax.jit(lambda x: both(jax.checkpoint(attend, policy=policy), x))(inputs_of())
    assert_same(got, alone())


def placed(inputs, mesh):
    spec = lambda name: PartitionSpec("data", "tensor") if name == "initial_state" else SPEC
    spec_of = lambda name: PartitionSpec("data") if name == "segment_ids" else spec(name)
    return {name: jax.device_put(x, NamedSharding(mesh, spec_of(name))) for name, x in inputs.items()}


def mesh_of(kind, shape):
    """To run on, two devices: each warpgroup of each blocks one of the interpreter's threads, of which it has eight."""
    size = shape[0] * shape[1]
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2, devices=jax.devices()[:size])


def gathers(text):
    return re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)


def compiled_on(attend, mesh, kind):
    """The compiled program for inputs that are sharded over the mesh, and these."""
    options = dict(partition_spec=SPEC) if kind == AxisType.Auto else {}
    op = functools.partial(attend, **options)
    inputs = placed(inputs_of(), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(lambda x: both(op, x)).lower(inputs).compile(), inputs


EXPLICIT = pytest.param(AxisType.Explicit, id="explicit", marks=pytest.mark.slow)
kinds = pytest.mark.parametrize("kind", [pytest.param(AxisType.Auto, id="auto"), EXPLICIT])


@several
@on_devices
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["batch", "heads"])
@kinds
def test_sharded(attend, alone, kind, shape):
    """Batch or heads on two devices: each device runs its own share."""
    compiled, inputs = compiled_on(attend, mesh_of(kind, shape), kind)
    got = compiled(inputs)
    for name, x in got[1].items():
        assert x.sharding.is_equivalent_to(inputs[name].sharding, x.ndim), name
    assert_same(got, alone())


@several
@pytest.mark.usefixtures("races")
@kinds
def test_nothing_is_gathered(attend, kind):
    """Batch and heads on 2 x 2 devices, compiled only."""
    compiled, _ = compiled_on(attend, mesh_of(kind, (2, 2)), kind)
    assert not gathers(compiled.as_text())


@several
@on_devices
@pytest.mark.parametrize("check", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["checked", "unchecked"])
def test_shard_map_by_the_caller(attend, alone, check):
    """Rows split by the caller's own shard_map, with its check of what varies over the mesh and without."""
    mesh = mesh_of(AxisType.Auto, (2, 1))
    rows = PartitionSpec("data")
    op = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)
    assert_same(jax.jit(lambda x: both(op, x))(inputs_of()), alone())


@pytest.mark.slow
@several
@on_devices
def test_shard_map_with_shared_inputs(attend):
    """Some inputs are the same on every device: their gradients are summed over the devices."""
    mesh, rows, same = mesh_of(AxisType.Auto, (2, 1)), PartitionSpec("data"), PartitionSpec()
    inputs = inputs_of()
    shared = dict(initial_state=inputs["initial_state"][:1])
    mine = {name: x for name, x in inputs.items() if name != "initial_state"}
    spec = {name: same if name in shared else rows for name in inputs}
    op = jax.shard_map(attend, mesh=mesh, in_specs=(spec,), out_specs=rows)
    got = jax.jit(lambda x: both(op, x))(mine | shared)
    whole = mine | dict(initial_state=np.repeat(shared["initial_state"], BATCH, 0))
    want = jax.tree.map(np.asarray, jax.jit(lambda x: both(attend, x))(whole))
    want[1]["initial_state"] = np.sum(want[1]["initial_state"], 0, keepdims=True)
    assert_same(got, want)
