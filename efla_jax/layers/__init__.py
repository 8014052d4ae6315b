"""Layers in Flax NNX: the EFLA mixer, softmax attention, short convolution, MLP."""

from efla_jax.layers.attention import AttentionConfig, KeyValueCache, SoftmaxAttention
from efla_jax.layers.convolution import ShortConvolution
from efla_jax.layers.mixer import EFLA, Cache, MixerConfig
from efla_jax.layers.mlp import SwiGLU

__all__ = [
    "EFLA",
    "AttentionConfig",
    "Cache",
    "KeyValueCache",
    "MixerConfig",
    "ShortConvolution",
    "SoftmaxAttention",
    "SwiGLU",
]
