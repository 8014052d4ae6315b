"""Sizes of language models by name.

"340m" and "1.3b" are those of the framework that the paper (arXiv 2512.12602v4) trained in: its DeltaNet presets,
24 layers, heads of 128, convolutions of width 4, SiLU on q, k and v, SwiGLU of ratio 4, untied embeddings of a
vocabulary of 32,000. The names are its own; counted whole, the models have 374M and 1,365M parameters.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from efla_jax.choices import check_choice
from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models.language_model import LanguageModel, LanguageModelConfig


def _paper_size(features: int, heads: int, hidden: int) -> LanguageModelConfig:
    mixer = MixerConfig(
        heads=heads, key_dim=128, value_dim=128, conv_width=4, activation=True, beta_bias=None, scale=128**-0.5
    )
    return LanguageModelConfig(
        vocab_size=32_000, features=features, layers=24, hidden=hidden, mixer=mixer,
        attention=AttentionConfig(heads=heads, head_dim=128), context=4096, dtype="bfloat16",
    )  # fmt: skip


PRESETS: dict[str, LanguageModelConfig] = {
    "tiny": LanguageModelConfig(
        features=128,
        layers=4,
        hidden=384,
        mixer=MixerConfig(heads=4, key_dim=32, value_dim=32, conv_width=4, activation=True),
        attention=AttentionConfig(heads=4, head_dim=32, window=256),
        context=1024,
    ),
    "340m": _paper_size(1024, 8, 2816),
    "1.3b": _paper_size(2048, 16, 5632),
}


def preset(name: str, **changes: Any) -> LanguageModelConfig:
    """The config of this name with fields replaced, such as mixers=("gated_efla",).

    Raises:
        ValueError: there is no such preset; the nearest is named.
    """
    check_choice("preset", name, PRESETS)
    return dataclasses.replace(PRESETS[name], **changes)


def parameter_count(config: LanguageModelConfig) -> int:
    """Number of parameters, embedding and head included."""
    form = nnx.eval_shape(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param))
    return sum(leaf.size for leaf in jax.tree.leaves(form))
