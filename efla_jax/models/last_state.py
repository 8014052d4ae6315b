"""The paper's sequential-MNIST model (arXiv 2512.12602, Fig. 1): one layer, one head, read out from the last state."""

from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt8

from efla_jax.choices import Dtype, check_choice, check_sizes
from efla_jax.layers.mixer import Beta, step_size, unit_keys
from efla_jax.models.classifier import check_tokens, pixel_tokens
from efla_jax.ops.attention import efla_attention
from efla_jax.ops.coefficients import INTEGRATORS, Integrator


@dataclass(frozen=True)
class LastStateConfig:
    """EFLA: integrator "exact" on raw keys. DeltaNet: "euler" with normalize_keys.

    dtype is that of activations and products; parameters, state and logits are float32.
    """

    pixels: int = 784
    pixels_per_token: int = 1
    classes: int = 10
    features: int = 64
    integrator: Integrator = "exact"
    normalize_keys: bool = False
    beta: Beta = "sigmoid"
    beta_bias: float = -2.0
    dtype: Dtype = "float32"

    def __post_init__(self):
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("integrator", self.integrator, INTEGRATORS)
        check_choice("beta", self.beta, get_args(Beta))
        check_sizes(self, "pixels", "pixels_per_token", "classes", "features")
        check_tokens(self.pixels, self.pixels_per_token)

    @property
    def tokens(self) -> int:
        return self.pixels // self.pixels_per_token

    @property
    def key_heads(self) -> int:
        return 1


class LastStateClassifier(nnx.Module):
    """GELU(embed + position) -> q, k, v, β -> o = S_Tᵀ q_T -> LayerNorm -> logits. No MLP, no residual."""

    def __init__(self, config: LastStateConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, options = config.features, dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
        linear = dict(use_bias=False, kernel_init=nnx.initializers.xavier_uniform(), **options)
        self.embed = nnx.Linear(config.pixels_per_token, size, **linear)
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (config.tokens, size)))
        self.query, self.key, self.value = (nnx.Linear(size, size, **linear) for _ in range(3))
        self.beta = nnx.Linear(size, 1, bias_init=nnx.initializers.constant(config.beta_bias), **options)
        self.norm = nnx.LayerNorm(size, **options)
        self.head = nnx.Linear(size, config.classes, **options)

    def __call__(
        self,
        images: Float[Array, "B *pixels"] | UInt8[Array, "B *pixels"],
        *,
        dropout_key: jax.Array | None = None,
        partition_spec: PartitionSpec | None = None,
    ) -> Float[Array, "B classes"]:
        """Logits of images, intensities in [0, 1] or uint8. The model has no dropout and uses no dropout_key."""
        del dropout_key
        position_TE = self.position[...].astype(self.config.dtype)
        x_BTE = self.embed(pixel_tokens(images, self.config.pixels_per_token)) + position_TE[None]
        x_BTE = jax.nn.gelu(x_BTE, approximate=False)
        key_BTK = self.key(x_BTE)
        if self.config.normalize_keys:
            key_BTK = unit_keys(key_BTK)
        one_head = lambda x: x[:, :, None]
        _, state_BHKV = efla_attention(
            one_head(key_BTK),  # stands in for the query: the outputs are not used, only the state
            one_head(key_BTK),
            one_head(self.value(x_BTE)),
            step_size(self.beta(x_BTE), self.config.beta),
            integrator=self.config.integrator,
            partition_spec=partition_spec,
        )
        last_BK = self.query(x_BTE[:, -1])
        logits = self.head(self.norm(jnp.einsum("bk,bkv->bv", last_BK, state_BHKV[:, 0])))
        return logits.astype(jnp.float32)
