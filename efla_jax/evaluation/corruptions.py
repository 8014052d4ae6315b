"""The three corruptions of the paper's Figure 1 (arXiv 2512.12602), on intensities in [0, 1], in scan order.

None of them clips, so that a corrupted intensity may leave [0, 1]. Noise is drawn per digit, keyed by its index in
the data set: it does not depend on batches, devices or the model.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# name -> levels, as in Figure 1; the first level of each leaves the digits as they are
LEVELS: dict[str, tuple[float, ...]] = {
    "intensity": tuple(float(scale) for scale in range(1, 11)),
    "noise": tuple(step / 10 for step in range(11)),
    "dropout": tuple(step / 10 for step in range(11)),
}
LABELS = {"intensity": "intensity scale", "noise": "Gaussian noise σ", "dropout": "pixel dropout p"}


def _intensity(image: jax.Array, level: jax.Array, key: jax.Array) -> jax.Array:
    del key
    return level * image


def _noise(image: jax.Array, level: jax.Array, key: jax.Array) -> jax.Array:
    return image + level * jax.random.normal(key, image.shape)


def _dropout(image: jax.Array, level: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.uniform(key, image.shape) < level, 0.0, image)


_CORRUPTIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "intensity": _intensity,
    "noise": _noise,
    "dropout": _dropout,
}


def corrupt(name: str, images: jax.Array, level: jax.Array | float, indices: jax.Array, seed: int = 0) -> jax.Array:
    """images [B, ...] in [0, 1] at a level of the corruption; indices [B] are theirs in the data set."""
    key = jax.random.key(seed)
    one = lambda image, index: _CORRUPTIONS[name](image, jnp.asarray(level), jax.random.fold_in(key, index))
    return jax.vmap(one)(images, indices)
