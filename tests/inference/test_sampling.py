"""Sampling against the truncated distribution in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from efla_jax.inference.sampling import Rows, Sampling, fresh_rows, sample, truncate
from tests.inference.small import COMPILED

VOCABULARY, PADDED = 12, 16


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probability of each token of one row, written from the docstring of `truncate`, token by token."""
    scaled = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))[: top_k or len(scaled)]
    weights = {token: np.exp(scaled[token] - scaled[order[0]]) for token in order}
    total, kept, mass = sum(weights.values()), [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    return np.array([weights[token] if token in kept else 0.0 for token in range(len(scaled))]) / sum(
        weights[token] for token in kept
    )


def draw_logits(*shape, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows(batch, **settings) -> Rows:
    made = fresh_rows(batch)
    for name, value in settings.items():
        getattr(made, name)[:] = value
    return made


SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.3),
    dict(temperature=2.5),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.0, top_k=5),
    dict(temperature=1.0, top_k=99),
    dict(temperature=1.0, top_p=0.01),
    dict(temperature=1.0, top_p=0.8),
    dict(temperature=0.7, top_p=0.999),
    dict(temperature=1.7, top_k=4, top_p=0.75),  # in this order: the 0.75 are of the four
]


def test_truncation_is_its_definition_with_settings_of_each_row():
    """All settings in one batch: exact support, probabilities to rounding."""
    logits = draw_logits(len(SETTINGS), VOCABULARY)
    column = lambda name, default: np.array([setting.get(name, default) for setting in SETTINGS])
    kept, tokens = jax.jit(truncate)(
        logits,
        column("temperature", 1.0).astype(np.float32),
        column("top_k", 0),
        column("top_p", 1.0).astype(np.float32),
    )
    got = np.zeros((len(SETTINGS), VOCABULARY))
    np.put_along_axis(got, np.asarray(tokens), np.asarray(jax.nn.softmax(kept, axis=-1)), axis=-1)
    want = np.array([distribution(row, **setting) for row, setting in zip(logits, SETTINGS, strict=True)])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (want > 0).sum(1).tolist() != [VOCABULARY] * len(SETTINGS)


def test_of_equal_logits_the_lower_ids_stay():
    logits = np.array([[1.0, 3.0, 3.0, 3.0]], np.float32)
    ones = np.ones(1, np.float32)
    kept, tokens = truncate(jnp.asarray(logits), ones, np.array([2]), ones)
    assert np.asarray(tokens)[np.isfinite(kept)].tolist() == [1, 2]


def test_any_temperature_is_finite():
    logits = np.array([[1e4, 1.0, -1e4]], np.float32)
    for temperature in (1e-44, 1e-30, 1e30):
        kept, _ = truncate(jnp.asarray(logits), np.array([temperature], np.float32), np.zeros(1, int), np.ones(1))
        assert not np.any(np.isnan(kept))
        drawn = sample(jnp.asarray(logits), rows(1, temperature=temperature), 3)
        assert temperature > 1 or np.asarray(drawn.token).item() == 0


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[7], SETTINGS[9]], ids=str)
def test_draws_follow_the_distribution(settings):
    """χ² of 8192 rows, each with its seed, at the level 1e-4; nothing outside the support."""
    count = 8192
    logits = draw_logits(VOCABULARY, seed=1)
    padded = np.full(PADDED, 50.0, np.float32)  # ids that no tokenizer has, and would win
    padded[:VOCABULARY] = logits
    drawn = sample(np.tile(padded, (count, 1)), rows(count, seed=np.arange(count), **settings), VOCABULARY)
    seen = np.bincount(np.asarray(drawn.token)[:, 0], minlength=PADDED)
    want = distribution(logits, **settings)
    assert seen[VOCABULARY:].sum() == 0
    assert seen[:VOCABULARY][want == 0].sum() == 0
    support = want > 0
    assert stats.chisquare(seen[:VOCABULARY][support], count * want[support]).pvalue > 1e-4
    assert np.asarray(drawn.drawn).tolist() == [1] * count


def test_successive_draws_of_a_seed_are_independent():
    """χ² of the pairs of first and second draws against the product of the distribution with itself."""
    count = 8192
    logits = draw_logits(4, seed=2)
    first = sample(np.tile(logits, (count, 1)), rows(count, temperature=1.0, seed=np.arange(count)), 4)
    second = sample(np.tile(logits, (count, 1)), first, 4)
    pairs = np.bincount(np.asarray(4 * first.token + second.token)[:, 0], minlength=16)
    want = count * np.outer(distribution(logits), distribution(logits)).ravel()
    assert stats.chisquare(pairs, want).pvalue > 1e-4


def test_a_draw_depends_on_its_request_alone():
    """Not on the other rows, the row's place, or the batch's size; the likeliest token where temperature is 0."""
    logits = draw_logits(4, PADDED, seed=3)
    settings = dict(
        temperature=[1.0, 0.0, 2.0, 0.5], top_k=[0, 0, 5, 0], top_p=[0.9, 1, 1, 1], seed=[7, 8, 9, 2**32 - 1]
    )
    batch = rows(4, drawn=[0, 1, 2, 300], **settings)
    together = np.asarray(sample(logits, batch, PADDED).token)
    turned = [np.roll(field, 1, axis=0) for field in batch]
    np.testing.assert_array_equal(
        np.asarray(sample(np.roll(logits, 1, 0), Rows(*turned), PADDED).token), np.roll(together, 1, 0)
    )
    for row in range(4):
        alone = Rows(*(field[row : row + 1] for field in batch))
        assert np.asarray(sample(logits[row : row + 1], alone, PADDED).token).item() == together[row, 0]
    assert together[1, 0] == np.argmax(logits[1])


def test_settings_are_no_constants_of_the_program():
    logits = draw_logits(2, PADDED)
    sample(logits, rows(2), PADDED)
    COMPILED.clear()
    for setting in SETTINGS:
        sample(logits, rows(2, **setting), PADDED)
    assert COMPILED == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=-0.5), "temperature is -0.5; it must be finite and at least 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_k=-1), "top_k is -1; it must be at least 0"),
        (dict(top_p=0.0), r"top_p is 0.0; it must be in \(0, 1\]"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(seed=-1), "seed is -1; it must be in"),
        (dict(seed=2**32), "seed is 4294967296"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**change)
