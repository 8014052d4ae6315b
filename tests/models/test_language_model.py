"""The language model: its blocks, one call and many, documents, causality, types, remat, its config."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModel, LanguageModelConfig, build
from efla_jax.models.cross_entropy import summed_loss
from efla_jax.models.language_model import LINEAR_MIXERS, MIXERS
from efla_jax.training.config import Config, differences, from_json, override, to_json

LENGTH, VOCAB = 9, 11
TINY = LanguageModelConfig(
    vocab_size=VOCAB,
    features=12,
    layers=1,
    hidden=16,
    # no output norm: it blows up the rounding of a query that meets its key at right angles
    mixer=MixerConfig(heads=2, key_dim=4, value_dim=6, conv_width=3, activation=True, output_norm=False),
    attention=AttentionConfig(heads=2, key_value_heads=1, head_dim=4, window=3),
    context=16,
)
HYBRID = dataclasses.replace(TINY, layers=3, mixers=("gated_efla", "softmax"))
WIDE = dataclasses.replace(TINY.mixer, heads=6)
PAIR = dataclasses.replace(TINY, layers=2, mixers=("efla", "sliding_window"))


@functools.cache
def make(config) -> Any:
    """Not jitted: what draws parameters is compiled once for all layers with the same shapes. No norm's scale is 1."""
    model = LanguageModel(config, rngs=nnx.Rngs(2))
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "scale":
            leaf[...] = jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
    return model


@nnx.jit
def apply(model, tokens, cache=None, ids=None, lengths=None):
    return model(tokens, cache=cache, segment_ids=ids, lengths=lengths)


def draw(seed=0, batch=2, length=LENGTH):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)), jnp.int32)


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# ---- what it computes ----


def test_is_its_blocks_one_after_the_other():
    """x + mixer(norm x), then x + mlp(norm x), all but the mixers in NumPy; a list of mixers is repeated."""
    model, tokens = make(HYBRID), draw()
    assert [type(block.mixer).__name__ for block in model.blocks] == ["EFLA", "SoftmaxAttention", "EFLA"]
    assert [block.mixer.reach for block in (model.blocks[1], make(PAIR).blocks[1])] == [16, 3]
    weight = lambda layer: np.asarray(layer.kernel[...], np.float64)
    norm = lambda layer, x: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * np.asarray(layer.scale[...])
    x = np.asarray(model.embed.embedding[...], np.float64)[np.asarray(tokens)]
    for block in model.blocks:
        mixed, _ = nnx.jit(lambda mixer, x: mixer(x))(block.mixer, jnp.asarray(norm(block.mixer_norm, x), jnp.float32))
        x = x + np.asarray(mixed)
        normed = norm(block.mlp_norm, x)
        gate = normed @ weight(block.mlp.gate)
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ weight(block.mlp.up))) @ weight(block.mlp.down)
    hidden, _ = apply(model, tokens)
    want = norm(model.norm, x)
    close(hidden, want)
    close(model.logits(hidden), want @ weight(model.head))


def test_the_name_of_a_mixer_sets_rule_and_decay():
    wanted = {
        "efla": ("exact", False, "none"),
        "gated_efla": ("exact", False, "log"),
        "v4_efla": ("exact", False, "v4"),
        "deltanet": ("euler", True, "none"),
        "gated_deltanet": ("euler", True, "log"),
        "v4_deltanet": ("euler", True, "v4"),
    }
    assert list(wanted) == list(LINEAR_MIXERS)
    for name, want in wanted.items():
        (block,) = make(dataclasses.replace(TINY, mixers=(name,))).blocks
        config = block.mixer.config
        assert (config.integrator, config.normalize_keys, config.decay) == want
        rest: Any = dict(integrator="exact", normalize_keys=False, decay="none")
        assert dataclasses.replace(config, **rest) == dataclasses.replace(TINY.mixer, **rest)


def test_a_tied_head_is_the_embedding():
    tied = make(dataclasses.replace(PAIR, tied=True))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)))
    assert not hasattr(tied, "head")
    table = np.asarray(tied.embed.embedding[...], np.float64)
    close(tied.logits(hidden), np.asarray(hidden) @ table.T)
    np.testing.assert_array_equal(tied.head_kernel(), table.T)
    untied = make(PAIR)
    np.testing.assert_array_equal(untied.head_kernel(), untied.head.kernel[...])
    assert untied.head_kernel().shape == (12, VOCAB)


def test_gate_strengths_are_those_of_the_mixers():
    """A tuple with one entry per block; softmax has no gate."""
    model, tokens = make(PAIR), draw()
    _, _, strengths = nnx.jit(lambda model, tokens: model.trace(tokens))(model, tokens)
    x = model.embed.embedding[...][tokens]
    want = nnx.jit(lambda block, x: block.mixer.mix(block.mixer_norm(x))[2])(model.blocks[0], x)
    close(strengths[0], want, 1e-5)
    assert np.ptp(want) > 0.01
    assert strengths[1].shape == strengths[0].shape == tokens.shape
    assert np.all(np.isnan(strengths[1]))
    assert [block.has_gate for block in model.blocks] == [True, False]


# ---- calls in parts ----


@pytest.mark.parametrize("mixers", [*((name,) for name in MIXERS), HYBRID.mixers], ids="+".join)
def test_calls_in_parts_are_one_call(mixers):
    """Two prefills and a decoding step, through the cache, against a call without one."""
    config = HYBRID if mixers == HYBRID.mixers else dataclasses.replace(TINY, mixers=mixers)
    model, tokens = make(config), draw()
    want, _ = apply(model, tokens)
    cache, parts = model.empty_cache(2), []
    for start, stop in itertools.pairwise((0, 4, 8, LENGTH)):
        hidden, cache = apply(model, tokens[:, start:stop], cache)
        parts.append(hidden)
    close(jnp.concatenate(parts, axis=1), want)


def test_rows_are_slots_that_fill_at_their_own_pace():
    """Row 0 goes on by 4 tokens, row 1 by 1, row 2 by none; then a row is moved to another slot by index."""
    model, tokens = make(HYBRID), draw(batch=3)
    want, _ = apply(model, tokens)
    _, held = apply(model, tokens[:, :4], model.empty_cache(3))
    hidden, cache = apply(model, tokens[:, 4:8], held, None, jnp.asarray([4, 1, 0], jnp.int32))
    close(hidden[0], want[0, 4:8])
    close(hidden[1, :1], want[1, 4:5])
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[2], new[2]), held, cache)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(cache))
    moved = jax.tree.map(lambda leaf: leaf[jnp.asarray([1, 2, 0])], cache)
    following = jnp.stack([tokens[1, 5:], tokens[2, 4:8], jnp.pad(tokens[0, 8:], (0, 3))])
    hidden, _ = apply(model, following, moved, None, jnp.asarray([4, 4, 1], jnp.int32))
    close(hidden[0], want[1, 5:])
    close(hidden[1], want[2, 4:8])
    close(hidden[2, :1], want[0, 8:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_empty_cache_is_of_the_types_that_calls_return(dtype):
    model = make(dataclasses.replace(HYBRID, dtype=dtype))
    empty = model.empty_cache(2)
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for length in (1, 4):
        assert form(jax.eval_shape(lambda x: model(x, cache=empty)[1], draw(length=length))) == form(empty)


# ---- documents, causality ----


def pull_back(tokens, ids, cotangent):
    """-> hidden, and the gradient of the embedding that this cotangent gives."""
    hidden, gradient = _pull_back(*nnx.split(make(HYBRID), nnx.PathContains("embed"), ...), tokens, ids, cotangent)
    return hidden, gradient["embed"]["embedding"][...]


@functools.partial(jax.jit, static_argnums=0)
def _pull_back(graph, table, rest, tokens, ids, cotangent):
    hidden, pullback = jax.vjp(lambda table: nnx.merge(graph, table, rest)(tokens, segment_ids=ids)[0], table)
    return hidden, pullback(cotangent)[0]


def test_no_token_sees_a_later_one():
    """All tokens differ, so a row of the embedding stands for a position."""
    tokens, ids = jnp.arange(LENGTH)[None], jnp.zeros((1, LENGTH), jnp.int32)
    weight = np.random.default_rng(0).normal(size=TINY.features)
    reach = []
    for position in range(LENGTH):
        cotangent = np.zeros((1, LENGTH, TINY.features), np.float32)
        cotangent[0, position] = weight
        _, gradient = pull_back(tokens, ids, cotangent)
        reach.append(np.any(np.asarray(gradient)[:LENGTH] != 0, axis=-1))
    np.testing.assert_array_equal(reach, np.tril(np.ones((LENGTH, LENGTH), bool)))


@pytest.mark.parametrize("perturbed", [1, 2])
def test_no_bit_of_a_document_enters_another(perturbed):
    """The documents have no token in common, so every row of the embedding gets its gradient from one of them."""
    ids = np.array([[1] * 4 + [2] * 5], np.int32)
    inside = ids == perturbed
    tokens, other = ([[0, 1, 2, 3, *rest]] for rest in ([5, 6, 7, 8, 9], [9, 5, 10, 6, 8]))
    other[0][:4] = [3, 0, 4, 1]
    cotangent, another = np.random.default_rng(0).normal(size=(2, 1, LENGTH, TINY.features)).astype(np.float32)
    before = pull_back(jnp.asarray(tokens), ids, cotangent)
    after = pull_back(
        jnp.asarray(np.where(inside, other, tokens)), ids, jnp.where(inside[..., None], another, cotangent)
    )
    own = slice(5, None) if perturbed == 1 else slice(5)
    for old, new, kept in zip(before, after, (~inside, own), strict=True):
        np.testing.assert_array_equal(np.asarray(old)[kept], np.asarray(new)[kept])
    assert np.all(np.any(np.asarray(before[0])[inside] != np.asarray(after[0])[inside], axis=-1))
    used = sorted({token for token in tokens[0] if token in range(VOCAB)[own]})
    assert np.all(np.any(np.asarray(before[1])[used] != 0, axis=-1))


def test_packed_documents_are_read_one_by_one():
    model, tokens = make(HYBRID), draw(batch=1)
    ids = jnp.asarray([[7] * 2 + [3] * 4 + [7] * 3], jnp.int32)  # the last has an id seen before
    packed, _ = apply(model, tokens, None, ids)
    parts = [apply(model, tokens[:, start:stop])[0] for start, stop in itertools.pairwise((0, 2, 6, LENGTH))]
    close(packed, jnp.concatenate(parts, axis=1))


# ---- types and remat ----


def test_bfloat16_keeps_float32_parameters_and_logits():
    tokens = draw()
    model = make(dataclasses.replace(HYBRID, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    hidden, _ = apply(model, tokens)
    want, _ = apply(make(HYBRID), tokens)
    assert hidden.dtype == jnp.bfloat16
    logits = model.logits(hidden)
    assert logits.dtype == jnp.float32
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))  # summed in float32, not rounded after
    # Of the order of what rounding the parameters once does to the model in float32: a block rounds about ten arrays,
    # whose independent errors add up to three times that of one.
    graph, params = nnx.split(make(HYBRID), nnx.Param)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    once, _ = apply(nnx.merge(graph, rounded), tokens)
    error = lambda x: np.linalg.norm(np.asarray(x, np.float64) - want)
    assert 0 < error(hidden) < 4 * error(once)


def test_remat_changes_what_is_kept_and_nothing_else():
    tokens, gradients, counts = draw(), {}, {}
    for remat in ("none", "dots", "full"):
        graph, params = nnx.split(make(dataclasses.replace(TINY, remat=remat)), nnx.Param)

        def loss_of(params, graph=graph):
            model = nnx.merge(graph, params)
            return summed_loss(model(tokens)[0], model.head_kernel(), tokens[:, ::-1])[0]

        run = jax.value_and_grad(loss_of)
        counts[remat] = str(jax.make_jaxpr(run)(params)).count("dot_general")
        gradients[remat] = jax.jit(run)(params)
    # the backward pass computes products with activations again, and with "full" those with weights too
    assert counts["none"] < counts["dots"] < counts["full"]
    for remat in ("dots", "full"):
        close(gradients[remat][0], gradients["none"][0], 1e-6)
        jax.tree.map(lambda x, y: close(x, y, 1e-5), gradients[remat][1], gradients["none"][1])


# ---- the config ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixers=("elfa",)), "mixers is 'elfa'; it must be one of efla, .*did you mean 'efla'"),
        (
            dict(mixers=("efla", "gated_deltanett"), layers=2),
            "mixers is 'gated_deltanett'; .*did you mean 'gated_deltanet'",
        ),
        (dict(mixers="efla", layers=4), "mixers is 'efla'; it must be a tuple of names"),
        (dict(mixers=()), "mixers has 0 names; it must have 1 to layers = 1"),
        (dict(mixers=("efla", "softmax")), "mixers has 2 names; it must have 1 to layers = 1"),
        (dict(vocab_size=0), "vocab_size is 0; it must be at least 1"),
        (dict(features=0), "features is 0"),
        (dict(layers=0), "layers is 0"),
        (dict(hidden=-1), "hidden is -1"),
        (dict(context=0), "context is 0"),
        (dict(dtype="float8"), "dtype is 'float8'; it must be one of float32, bfloat16, float16"),
        (dict(remat="ful"), "remat is 'ful'; .*did you mean 'full'"),
        # a gate that suits EFLA but not what the mixer's name makes of it
        (dict(mixers=("deltanet",), mixer=MixerConfig(initial_gate=0.3, beta_bias=None)), "initial_gate needs a bias"),
    ],
)
def test_a_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "key_heads", "reach"),
    [
        (dict(mixers=("efla",)), 2, None),
        (dict(mixers=("efla",), mixer=dataclasses.replace(WIDE, key_heads=3)), 3, None),
        (dict(mixers=("softmax",)), 1, 16),
        (dict(mixers=("sliding_window",), attention=AttentionConfig(heads=5)), 5, None),
        (dict(mixers=("softmax", "deltanet"), layers=3), 1, 16),
        (dict(mixers=("efla", "sliding_window"), layers=2, mixer=WIDE, attention=AttentionConfig(heads=4)), 2, None),
    ],
)
def test_what_a_config_says_of_its_mixers(change, key_heads, reach):
    config = dataclasses.replace(TINY, **change)
    assert (config.key_heads, config.reach) == (key_heads, reach)


def test_config_goes_through_json_and_flags():
    config = Config(model=dataclasses.replace(HYBRID, tied=True, remat="dots", dtype="bfloat16"))
    again: Any = from_json(to_json(config))
    assert again == config
    assert type(again.model) is LanguageModelConfig
    assert again.model.mixers == ("gated_efla", "softmax")
    assert type(again.model.mixer) is MixerConfig
    assert type(again.model.attention) is AttentionConfig
    changed: Any = override(
        config, ["--config.model.mixers=('efla','softmax')", "--config.model.mixer.initial_gate=0.3"]
    )
    assert changed.model.mixers == ("efla", "softmax")
    assert sorted(line.partition(":")[0] for line in differences(changed, config)) == [
        "model.mixer.initial_gate",
        "model.mixers",
    ]


def test_build_makes_it():
    assert type(build(TINY, rngs=nnx.Rngs(0))) is LanguageModel
