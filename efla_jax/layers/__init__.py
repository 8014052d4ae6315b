"""Layers in Flax NNX: the EFLA mixer, short convolution, MLP."""

from efla_jax.layers.convolution import ShortConvolution
from efla_jax.layers.mixer import EFLA, Cache, MixerConfig
from efla_jax.layers.mlp import SwiGLU

__all__ = ["EFLA", "Cache", "MixerConfig", "ShortConvolution", "SwiGLU"]
