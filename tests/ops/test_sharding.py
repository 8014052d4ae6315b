"""Batch and heads split over 8 simulated devices: the results of one device, and nothing gathered."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efla_jax import efla_attention, efla_step
from efla_jax.ops.registry import REGISTRY, Implementation
from tests.ops.helpers import EPS, draw, errors

pytestmark = pytest.mark.cpu("needs eight devices")

SPEC = PartitionSpec(("data", "fsdp"), None, "tensor")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def mesh(kind):
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)


def placed(inputs, mesh, extra=0):
    """Inputs of the op put on the mesh as SPEC says; `extra` axes in front are not split."""

    def put(name, x):
        batch, _, heads = SPEC
        spec = (
            (batch, heads) if name == "initial_state" else (batch,) if name == "segment_ids" else (batch, None, heads)
        )
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * extra, *spec)))

    return {name: put(name, x) for name, x in inputs.items()}


def forward(inputs, **options):
    return dict(zip(("output", "state"), efla_attention(**inputs, **options), strict=True))


def backward(inputs, **options):
    """Gradients of sum(sin(output)) + sum(sin(state)); segment_ids have none."""
    ids = {name: x for name, x in inputs.items() if name == "segment_ids"}
    loss = lambda floats: sum(jnp.sum(jnp.sin(x)) for x in forward(floats | ids, **options).values())
    return jax.grad(loss)({name: x for name, x in inputs.items() if name not in ids})


def collectives(compiled):
    """Collectives by name, but for the one number that the loss's own sum is reduced to."""
    lines = [line for line in compiled.as_text().splitlines() if re.search(r"= f32\[\]\S* all-reduce", line) is None]
    counts = {kind: sum(bool(re.search(rf" {kind}(-start)?\(", line)) for line in lines) for kind in COLLECTIVES}
    return {kind: count for kind, count in counts.items() if count}


def assert_same(got, want):
    got, want = (jax.tree.map(np.asarray, x) for x in (got, want))
    assert max(errors(got, want).values()) < 8 * EPS


def inputs_of(batch=4, segments=True):
    inputs = draw(batch=batch, length=40, decay=True)
    if segments:
        inputs["segment_ids"] = (np.arange(40) > np.arange(batch)[:, None] * 9).astype(np.int32)
    return inputs


def test_a_gather_is_seen():
    """The detector itself: what is split goes in, the whole comes out."""
    on = mesh(AxisType.Auto)
    whole = NamedSharding(on, PartitionSpec())
    compiled = jax.jit(lambda x: 2 * x, out_shardings=whole).lower(placed(inputs_of(), on)["value"]).compile()
    assert "all-gather" in collectives(compiled)


@pytest.mark.parametrize("run", [forward, backward])
@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_split(kind, implementation, run):
    """Auto axes take partition_spec; Explicit ones read it from value's type. Neither gathers or reduces anything."""
    run = partial(run, implementation=implementation)
    inputs, on = inputs_of(), mesh(kind)
    want = jax.jit(run)(inputs)
    with jax.set_mesh(on):
        options = dict(partition_spec=SPEC) if kind == AxisType.Auto else {}
        compiled = jax.jit(partial(run, **options)).lower(placed(inputs, on)).compile()
        got = compiled(placed(inputs, on))
    assert collectives(compiled) == {}
    assert_same(got, want)
    for name, x in got.items():
        spec = (("data", "fsdp"), "tensor") if "state" in name else SPEC
        assert x.sharding.is_equivalent_to(NamedSharding(on, PartitionSpec(*spec)), x.ndim), name


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_kernel_sees_one_devices_share(kind, monkeypatch):
    """An implementation that the compiler could not split is asked about, and handed, one device's batch and heads."""
    calls, shapes = [], []

    def run(query, key, value, erase, write, log_decay, initial_state, segment_ids, **options):
        shapes.append([x.shape for x in (query, value, erase, log_decay, initial_state, segment_ids)])
        return value, initial_state

    monkeypatch.setitem(REGISTRY, "triton", Implementation(run, lambda call: calls.append(call)))
    inputs, on = inputs_of(), mesh(kind)
    with jax.set_mesh(on):
        options = dict(partition_spec=SPEC) if kind == AxisType.Auto else {}
        jax.jit(partial(forward, implementation="triton", **options)).lower(placed(inputs, on))
    assert shapes == [[(1, 40, 1, 5), (1, 40, 2, 7), (1, 40, 2), (1, 40, 2), (1, 2, 5, 7), (1, 40)]]
    assert [(call.batch, call.key_heads, call.heads) for call in calls] == [(1, 1, 2)]


@pytest.mark.parametrize("run", [forward, backward])
def test_compiler_partitions_xla(run):
    """Without partition_spec, and without a mesh in context, the compiler splits the plain `xla` form by itself."""
    run = partial(run, implementation="xla")
    inputs, on = inputs_of(), mesh(AxisType.Auto)
    want = jax.jit(run)(inputs)
    compiled = jax.jit(run).lower(placed(inputs, on)).compile()
    got = compiled(placed(inputs, on))
    assert collectives(compiled) == {}
    assert_same(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_vmap(kind):
    run = partial(backward, implementation="xla")
    inputs, on = inputs_of(), mesh(kind)
    stacked = {name: np.stack([x, x[::-1]]) for name, x in inputs.items()}
    want = jax.jit(jax.vmap(run))(stacked)
    with jax.set_mesh(on):
        options = dict(partition_spec=SPEC) if kind == AxisType.Auto else {}
        compiled = jax.jit(jax.vmap(partial(run, **options))).lower(placed(stacked, on, extra=1)).compile()
        got = compiled(placed(stacked, on, extra=1))
    assert collectives(compiled) == {}
    assert_same(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_step(kind):
    inputs, on = inputs_of(segments=False), mesh(kind)

    def step(inputs):
        tokens = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}
        return dict(zip(("output", "state"), efla_step(**tokens, state=inputs["initial_state"]), strict=True))

    want = jax.jit(step)(inputs)
    with jax.set_mesh(on):
        compiled = jax.jit(step).lower(placed(inputs, on)).compile()
        got = compiled(placed(inputs, on))
    assert collectives(compiled) == {}
    assert_same(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_no_state(kind):
    """The zeros that stand for no initial state take their split from the mesh."""
    inputs, on = inputs_of(segments=False), mesh(kind)
    del inputs["initial_state"]
    run = partial(forward, implementation="xla")
    with jax.set_mesh(on):
        options = dict(partition_spec=SPEC) if kind == AxisType.Auto else {}
        compiled = jax.jit(partial(run, **options)).lower(placed(inputs, on)).compile()
        got = compiled(placed(inputs, on))
    assert collectives(compiled) == {}
    want = jax.jit(run)(inputs)
    assert_same(got, want)


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, None, "tensor"), PartitionSpec()], ids=str)
def test_one_of_both(spec):
    """Only the batch, only the heads, or neither is split."""
    inputs, on = inputs_of(segments=False), mesh(AxisType.Auto)
    run = partial(forward, implementation="xla")
    with jax.set_mesh(on):
        got = jax.jit(partial(run, partition_spec=spec))(inputs)
    assert_same(got, jax.jit(run)(inputs))


def test_inside_the_callers_shard_map():
    """The caller splits the batch by shard_map; the heads are left to partition_spec."""
    inputs, on = inputs_of(segments=False), mesh(AxisType.Auto)
    run = partial(forward, implementation="xla")
    with jax.set_mesh(on):
        inner = partial(run, partition_spec=PartitionSpec(None, None, "tensor"))
        rows = PartitionSpec(("data", "fsdp"))
        sharded = jax.shard_map(inner, in_specs=(rows,), out_specs=rows, axis_names={"data", "fsdp"})
        compiled = jax.jit(sharded).lower(placed(inputs, on)).compile()
        got = compiled(placed(inputs, on))
    assert collectives(compiled) == {}
    assert_same(got, jax.jit(run)(inputs))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PartitionSpec(None, "data"), "T and D of .* must not be split"),
        (PartitionSpec(None, None, None, "tensor"), "T and D of .* must not be split"),
        (PartitionSpec("rows"), r"names the axis 'rows', but the mesh in context has \('data', 'fsdp', 'tensor'\)"),
        (PartitionSpec(("data", "fsdp", "tensor")), r"splits B = 4 over .* of size 8; it must divide B"),
        (PartitionSpec("data", None, ("fsdp", "tensor")), r"splits Hk = 2 over .* of size 4; it must divide Hk"),
        (PartitionSpec(None, None, None, None, "data"), "at most 4 entries"),
    ],
)
def test_bad_spec(spec, message):
    with jax.set_mesh(mesh(AxisType.Auto)), pytest.raises(ValueError, match=f"partition_spec .*{message}"):
        efla_attention(**inputs_of(), partition_spec=spec)


def test_spec_without_mesh():
    with pytest.raises(ValueError, match="names the axis 'data', but no mesh is set"):
        efla_attention(**inputs_of(), partition_spec=PartitionSpec("data"))


def test_length_split_on_explicit_axes():
    on = mesh(AxisType.Explicit)
    inputs = {name: jax.device_put(x, NamedSharding(on, PartitionSpec())) for name, x in inputs_of().items()}
    inputs["value"] = jax.device_put(inputs["value"], NamedSharding(on, PartitionSpec(None, "data")))
    with jax.set_mesh(on), pytest.raises(ValueError, match=r"value's sharding is .*T and D of .* must not be split"):
        efla_attention(**inputs)


def test_axis_that_the_caller_splits():
    on = mesh(AxisType.Auto)
    op = partial(forward, implementation="xla", partition_spec=PartitionSpec("data"))
    rows = PartitionSpec("data")
    with jax.set_mesh(on), pytest.raises(ValueError, match="'data', which an outer shard_map already splits"):
        jax.shard_map(op, in_specs=(rows,), out_specs=rows)(inputs_of())
