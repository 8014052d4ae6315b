"""A residual stack of EFLA and MLP blocks that classifies a sequence of pixels."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt8

from efla_jax.choices import check_sizes
from efla_jax.layers import EFLA, MixerConfig, SwiGLU


def check_tokens(pixels: int, pixels_per_token: int) -> None:
    """Raises ValueError unless the pixels make whole tokens."""
    if pixels % pixels_per_token:
        raise ValueError(f"pixels_per_token is {pixels_per_token}; it must divide the {pixels} pixels")


def pixel_tokens(images: jax.Array, pixels_per_token: int) -> jax.Array:
    """[B, …] intensities -> [B, T, pixels_per_token] in scan order. uint8 is taken as 0 … 255 for 0 … 1."""
    pixels = images.reshape(images.shape[0], -1)
    check_tokens(pixels.shape[1], pixels_per_token)
    if pixels.dtype == jnp.uint8:
        pixels = pixels.astype(jnp.float32) / 255
    return pixels.reshape(images.shape[0], -1, pixels_per_token)


@dataclass(frozen=True)
class ClassifierConfig:
    """tokens of pixels_per_token pixels; `layers` blocks of width `features`, each a mixer and an MLP of `hidden`."""

    pixels: int = 784
    pixels_per_token: int = 28
    classes: int = 10
    features: int = 64
    layers: int = 2
    hidden: int = 192
    dropout: float = 0.0
    mixer: MixerConfig = field(default_factory=MixerConfig)

    def __post_init__(self):
        check_sizes(self, "pixels", "pixels_per_token", "classes", "features", "layers", "hidden")
        check_tokens(self.pixels, self.pixels_per_token)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def tokens(self) -> int:
        return self.pixels // self.pixels_per_token

    @property
    def key_heads(self) -> int:
        return self.mixer.key_heads or self.mixer.heads


class Block(nnx.Module):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.mixer_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.mixer = EFLA(config.features, config.mixer, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.mlp = SwiGLU(config.features, config.hidden, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_BTE, *, dropout_key, partition_spec):
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        for layer, key in ((self._mix, keys[0]), (lambda x, _: self.mlp(self.mlp_norm(x)), keys[1])):
            x_BTE = x_BTE + self.dropout(layer(x_BTE, partition_spec), deterministic=key is None, rngs=key)
        return x_BTE

    def _mix(self, x_BTE, partition_spec):
        return self.mixer(self.mixer_norm(x_BTE), partition_spec=partition_spec)[0]


class Classifier(nnx.Module):
    """Pixels -> tokens with learned positions -> blocks -> norm -> mean over tokens -> class logits."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Linear(config.pixels_per_token, config.features, rngs=rngs)
        position = nnx.initializers.normal(0.02)(rngs.params(), (config.tokens, config.features))
        self.position = nnx.Param(position)
        self.blocks = nnx.List(Block(config, rngs=rngs) for _ in range(config.layers))
        self.norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.head = nnx.Linear(config.features, config.classes, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "B *pixels"] | UInt8[Array, "B *pixels"],
        *,
        dropout_key: jax.Array | None = None,
        partition_spec: PartitionSpec | None = None,
    ) -> Float[Array, "B classes"]:
        """Logits of images, intensities in [0, 1] or uint8. dropout_key None is evaluation, without dropout."""
        x_BTE = self.embed(pixel_tokens(images, self.config.pixels_per_token)) + self.position[...][None]
        for number, block in enumerate(self.blocks):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
            x_BTE = block(x_BTE, dropout_key=key, partition_spec=partition_spec)
        return self.head(self.norm(x_BTE).mean(axis=1))
