"""Where things lie: one mesh with the axes data, fsdp and tensor, and a table from parameter names to axes."""

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

# The first rule that finds its pattern in a leaf's name applies, to parameters and optimizer moments alike; what
# matches none is replicated. Projections into heads split their heads over tensor, and fsdp the other side.
_RULES = (
    (r"\b(query|key|value|beta|gate|up)/kernel", P("fsdp", "tensor")),
    (r"\b(out|down)/kernel", P("tensor", "fsdp")),
    (r"\bembed/kernel", P(None, "fsdp")),
    (r"\bhead/kernel", P("fsdp", None)),
    (r"\bposition", P(None, "fsdp")),
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
    """The rule's axes where their size divides the leaf's; the others stay whole."""
    rule = next((spec for pattern, spec in _RULES if re.search(pattern, name)), P())
    if len(rule) != len(shape):
        return P()
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(rule, shape, strict=True)))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for every leaf of a state of arrays or ShapeDtypeStructs."""
    place = lambda path, leaf: NamedSharding(mesh, _spec(leaf_name(path), leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(place, state)
