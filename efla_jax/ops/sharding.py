"""Running the op on each device's own batches and heads: `jax.shard_map` entered from inside, mesh from context."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec


class Axes(NamedTuple):
    """Names of the mesh axes that split the batch and the heads."""

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def mesh_axes(partition_spec: PartitionSpec | None, key, value) -> Axes:
    """The axes that split B and H of [B, T, H, D]: as given, else read from value's type on Explicit axes.

    Raises:
        ValueError: the spec splits T or D, names an axis that the mesh in context lacks or that is already manual,
            or its axes do not divide the batch or the key heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if partition_spec is None:
        if mesh.empty or AxisType.Explicit not in mesh.axis_types:
            return Axes()
        partition_spec, source = jax.typeof(value).sharding.spec, "value's sharding"
    else:
        source = "partition_spec"
    if len(tuple(partition_spec)) > 4:
        raise ValueError(f"{source} is {partition_spec}; it must have at most 4 entries, for [B, T, H, D]")
    batch, length, heads, features = (*partition_spec, *[None] * (4 - len(tuple(partition_spec))))
    if _names(length) or _names(features):
        raise ValueError(f"{source} is {partition_spec}; T and D of [B, T, H, D] must not be split")
    axes = Axes(_names(batch), _names(heads))
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for what, size, names in (("B", value.shape[0], axes.batch), ("Hk", key.shape[2], axes.heads)):
        parts = 1
        for name in names:
            if name not in kinds:
                where = f"the mesh in context has {tuple(kinds)}" if kinds else "no mesh is set by jax.set_mesh"
                raise ValueError(f"{source} names the axis {name!r}, but {where}")
            if kinds[name] == AxisType.Manual:
                raise ValueError(f"{source} names the axis {name!r}, which an outer shard_map already splits")
            parts *= mesh.shape[name]
        if size % parts:
            raise ValueError(f"{source} splits {what} = {size} over {names} of size {parts}; it must divide {what}")
    return axes


def shards(axes: Axes) -> tuple[int, int]:
    """How many parts the batch and the heads are split into."""
    mesh = jax.sharding.get_abstract_mesh()
    batch = heads = 1
    for name in axes.batch:
        batch *= mesh.shape[name]
    for name in axes.heads:
        heads *= mesh.shape[name]
    return batch, heads


def constrain(x, *axes):
    """x with its dimensions split over these mesh axes (None, a name or names), where their sizes divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    fits = lambda size, names: size % math.prod(mesh.shape[name] for name in names) == 0
    spec = (axis if fits(size, _names(axis)) else None for size, axis in zip(x.shape, axes, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def share_manual_axes(*arrays):
    """Inside a caller's shard_map: arrays (or None) cast to vary over every axis that any of them varies over.

    A loop's carry keeps its type: a state that is the same on all devices could not take up what differs.
    """
    varying = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*varying)
    return tuple(
        x if every == own or x is None else jax.lax.pcast(x, tuple(sorted(every - own)), to="varying")
        for x, own in zip(arrays, varying, strict=True)
    )


def per_shard(run: Callable, axes: Axes, *inputs):
    """run(*inputs) on every device's share; inputs are those of an implementation, in order, None where absent."""
    if not axes.batch + axes.heads:
        return run(*inputs)
    tokens, state = (
        PartitionSpec(axes.batch, None, axes.heads),
        PartitionSpec(axes.batch, axes.heads),
    )
    rows = PartitionSpec(axes.batch)
    specs = (tokens,) * 6 + (state, rows)  # query … log_decay, initial_state, segment_ids
    present = [(x, spec) for x, spec in zip(inputs, specs, strict=True) if x is not None]
    holes = [x is None for x in inputs]

    def on_shard(*given):
        given = iter(given)
        return run(*(None if hole else next(given) for hole in holes))

    arrays, in_specs = zip(*present, strict=True)
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        arrays = tuple(jax.sharding.reshard(x, spec) for x, spec in present)
    # check_vma=False: kernels do not carry the varying-axes types that it checks
    mapped = jax.shard_map(
        on_shard,
        in_specs=in_specs,
        out_specs=(tokens, state),
        axis_names=set(axes.batch + axes.heads),
        check_vma=False,
    )
    return mapped(*arrays)
