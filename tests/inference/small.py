"""What the tests of inference share: tiny models of random parameters, and full forward passes to compare with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.inference.programs import JittedPrograms
from efla_jax.inference.text import TextModel
from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModel, LanguageModelConfig, graph_of

COMPILED: list[str] = []  # names of the programs that were compiled since it was cleared


def _listen(event: str, duration_secs: float, **metadata: str | int) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(str(metadata["fun_name"]))


jax.monitoring.register_event_duration_secs_listener(_listen)
LENGTH = 32  # of the forward passes that are compared with
SMALL = LanguageModelConfig(
    vocab_size=260,  # more than the 257 of bytes: a padded head
    features=16,
    layers=1,
    hidden=24,
    mixer=MixerConfig(heads=2, key_dim=4, value_dim=6, conv_width=3, activation=True),
    attention=AttentionConfig(heads=2, key_value_heads=1, head_dim=4, window=5),
    context=LENGTH,
)
HYBRID = dataclasses.replace(SMALL, layers=2, mixers=("gated_efla", "softmax"))
ENDLESS = dataclasses.replace(SMALL, mixers=("efla",))


@functools.cache
def parameters(config, seed=0):
    """Drawn by NumPy, which compiles nothing: matrices of unit gain, the head's of 3, all else around 1."""
    form = nnx.eval_shape(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param))
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        values = draw.normal(size=shape)
        if len(shape) == 1:
            return 1 + values / 4
        return values * (3 if "head" in str(path) else 1) / np.sqrt(shape[0])

    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(leaf(path, x.shape), x.dtype), form)


@functools.cache
def programs(config, batch_sizes=(1, 4), lengths=(1, 8)):
    return JittedPrograms(config, batch_sizes, lengths)


def text_model(config=HYBRID, seed=0):
    return TextModel(config, parameters(config, seed), load_tokenizer("bytes"), programs(config))


@functools.cache
def _full(config):
    """By the reference, token by token."""
    mixer = dataclasses.replace(config.mixer, implementation="scan")
    graph = graph_of(dataclasses.replace(config, mixer=mixer))

    @jax.jit
    def run(params, tokens_BT):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens_BT)[0])

    return run


def full_logits(config, tokens_BT, seed=0):
    """[B, T, vocab] of one forward pass without a cache; T up to LENGTH, padded behind: the model is causal."""
    return _logits(config, parameters(config, seed), tokens_BT)


def _logits(config, params, tokens_BT):
    padded = np.zeros((len(tokens_BT), LENGTH), np.int32)
    padded[:, : tokens_BT.shape[1]] = tokens_BT
    return np.asarray(_full(config)(params, jnp.asarray(padded)))[:, : tokens_BT.shape[1]]


@functools.cache
def rounding(config):
    """How far logits move, at most, when each parameter moves by its last place, up or down as drawn; the larger of two
    draws. Programs of one function differ by about as much: each of their sums is rounded in an order of its own."""
    params, tokens = parameters(config), draw_tokens(4, 23)

    def moved(draw):
        shift = lambda x: x * jnp.asarray(1 + draw.choice([-1, 1], x.shape) * 2.0**-23, x.dtype)
        return np.abs(_logits(config, jax.tree.map(shift, params), tokens) - _logits(config, params, tokens)).max()

    return max(moved(np.random.default_rng(seed)) for seed in range(2))


def greedy(config, tokens, count, vocabulary=257, seed=0):
    """The next `count` tokens, each the argmax of a forward pass over all before it."""
    tokens = list(tokens)
    for _ in range(count):
        logits = full_logits(config, np.array([tokens] * 4), seed)[0, -1, :vocabulary]
        tokens.append(int(np.argmax(logits)))
    return tokens[-count:]


def draw_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32)
