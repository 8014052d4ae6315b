"""Where things lie: a mesh of the axes data, fsdp and tensor, and two tables, names to logical axes to mesh axes."""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from efla_jax.training.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # [B, ...]
TOKENS = P(("data", "fsdp"), None, "tensor")  # [B, T, H, D] inside a mixer

# Where each logical axis of a parameter lies: the one table to change for another layout.
LOGICAL_AXES = dict(features="fsdp", heads="tensor", hidden="tensor", vocabulary="tensor", classes=None, tokens=None)

# Logical axes of parameters, optimizer moments alike: the first pattern found in a leaf's name applies; what matches
# none is replicated.
_PARAMETERS = (
    (r"\bmixer/(query|key|value|beta|gate|decay)/kernel", ("features", "heads")),
    (r"\bmixer/out/kernel", ("heads", "features")),
    (r"\bmlp/(gate|up)/kernel", ("features", "hidden")),
    (r"\bmlp/down/kernel", ("hidden", "features")),
    (r"\bembed/embedding", ("vocabulary", "features")),
    (r"\bembed/kernel", ("tokens", "features")),
    (r"\bhead/kernel", ("features", "vocabulary")),
    (r"\bposition", ("tokens", "features")),
    (r"\b(query|key|value|beta)/kernel", ("features", "heads")),  # the classifier that is one bare layer
)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    count = jax.device_count()
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        raise ConfigError(f"config.mesh is {sizes} over {AXES}; the sizes must multiply to the {count} devices here")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_name(path: Any) -> str:
    """Name of a pytree leaf: "params/blocks/0/mixer/key/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The mesh axes of its logical axes where their size divides the leaf's; the others stay whole."""
    logical = next((axes for pattern, axes in _PARAMETERS if re.search(pattern, name)), ())
    if len(logical) != len(shape):
        return P()
    axes = [LOGICAL_AXES[axis] for axis in logical]
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for every leaf of a state of arrays or ShapeDtypeStructs."""
    place = lambda path, leaf: NamedSharding(mesh, _spec(leaf_name(path), leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(place, state)
