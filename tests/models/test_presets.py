"""The presets: their sizes, counted layer by layer, and what the two large ones are made of."""

import dataclasses

import pytest

from efla_jax.layers import AttentionConfig
from efla_jax.models.language_model import MIXERS
from efla_jax.models.presets import PRESETS, parameter_count, preset


def counted(vocab, features, layers, hidden, mixer, tied=False):
    """Embedding, head, final norm; per block two norms, SwiGLU and the mixer."""
    tables = vocab * features * (1 if tied else 2)
    return tables + features + layers * (2 * features + 3 * features * hidden + mixer)


def linear(features, heads, dim, *, conv=4, beta_bias=True, decay="none"):
    """query, key, value, out; β; the convolutions; the norm of a head; the decay of each head and token."""
    size = heads * dim
    gate = {"none": 0, "log": features * heads + 2 * heads, "v4": features * heads + heads}[decay]
    return 4 * features * size + heads * (features + beta_bias) + 3 * conv * size + dim + gate


TINY = dict(vocab=257, features=128, layers=4, hidden=384)
TINY_MIXERS = {
    "efla": linear(128, 4, 32),
    "gated_efla": linear(128, 4, 32, decay="log"),
    "v4_efla": linear(128, 4, 32, decay="v4"),
    "deltanet": linear(128, 4, 32),
    "gated_deltanet": linear(128, 4, 32, decay="log"),
    "v4_deltanet": linear(128, 4, 32, decay="v4"),
    "softmax": 4 * 128 * 128,
    "sliding_window": 4 * 128 * 128,
}


@pytest.mark.parametrize(
    ("name", "features", "heads", "hidden", "want"),
    [("340m", 1024, 8, 2816, 374_362_112), ("1.3b", 2048, 16, 5632, 1_365_677_056)],
)
def test_sizes_of_the_papers_framework(name, features, heads, hidden, want):
    mixer = linear(features, heads, 128, beta_bias=False)
    assert counted(32_000, features, 24, hidden, mixer) == want
    assert parameter_count(preset(name)) == want
    config = preset(name)
    assert config.mixer.heads * config.mixer.key_dim == config.mixer.heads * config.mixer.value_dim == config.features
    assert (config.mixer.activation, config.mixer.output_norm, config.mixer.output_gate) == (True, True, False)
    assert config.mixer.scale == pytest.approx(128**-0.5)
    assert (config.dtype, config.tied) == ("bfloat16", False)


@pytest.mark.parametrize("name", MIXERS)
def test_size_of_tiny_with_each_mixer(name):
    assert parameter_count(preset("tiny", mixers=(name,))) == counted(**TINY, mixer=TINY_MIXERS[name])


def test_grouped_heads_and_a_tied_head_are_smaller():
    attention = AttentionConfig(heads=4, key_value_heads=1, head_dim=32)
    config = preset("tiny", mixers=("softmax",), attention=attention, tied=True)
    assert parameter_count(config) == counted(**TINY, mixer=2 * 128 * 128 + 2 * 128 * 32, tied=True)


def test_a_preset_is_changed_field_by_field():
    changed = preset("340m", mixers=("gated_efla",), context=8)
    assert changed == dataclasses.replace(PRESETS["340m"], mixers=("gated_efla",), context=8)
    assert PRESETS["340m"].context == 4096


def test_a_wrong_name_gives_the_nearest():
    with pytest.raises(ValueError, match=r"preset is '340M'; it must be one of tiny, 340m, 1\.3b; did you mean '340m'"):
        preset("340M")
