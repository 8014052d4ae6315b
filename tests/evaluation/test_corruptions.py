"""The corruptions of Figure 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax.evaluation.corruptions import LABELS, LEVELS, corrupt

EACH = pytest.mark.parametrize("name", LEVELS)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 28, 28)), jnp.float32)
INDEX = jnp.arange(6, dtype=jnp.int32)


def test_levels_are_those_of_the_figure():
    assert list(LABELS) == list(LEVELS) == ["intensity", "noise", "dropout"]
    assert LEVELS["intensity"] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    np.testing.assert_allclose(LEVELS["noise"], np.linspace(0, 1, 11))
    np.testing.assert_allclose(LEVELS["dropout"], np.linspace(0, 1, 11))


@EACH
def test_the_first_level_leaves_digits_as_they_are(name):
    np.testing.assert_array_equal(corrupt(name, IMAGES, LEVELS[name][0], INDEX), IMAGES)


@EACH
def test_a_digits_corruption_is_a_function_of_its_index(name):
    """Not of the batch that it comes in, nor of its place there; another index or seed draws another one."""
    level = LEVELS[name][5]
    whole = np.asarray(corrupt(name, IMAGES, level, INDEX))
    order = np.array([4, 1, 5])
    np.testing.assert_array_equal(corrupt(name, IMAGES[order], level, INDEX[order]), whole[order])
    same = jnp.broadcast_to(IMAGES[:1], (2, 28, 28))
    drawn = np.asarray(corrupt(name, same, level, INDEX[:2]))
    assert np.any(drawn[0] != drawn[1]) == (name != "intensity")
    other_seed = np.asarray(corrupt(name, IMAGES, level, INDEX, seed=1))
    assert np.any(other_seed != whole) == (name != "intensity")


def test_intensity_is_scaled_and_not_clipped():
    np.testing.assert_array_equal(corrupt("intensity", IMAGES, 7.0, INDEX), 7 * IMAGES)


def test_noise_is_gaussian_of_that_deviation_and_not_clipped():
    noise = np.asarray(corrupt("noise", IMAGES, 0.3, INDEX) - IMAGES) / 0.3
    count = noise.size
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.std() - 1) < 5 / (2 * count) ** 0.5
    assert abs(np.mean(np.abs(noise) < 1) - 0.6827) < 0.03
    # levels scale one draw
    np.testing.assert_allclose(corrupt("noise", IMAGES, 0.6, INDEX) - IMAGES, 0.6 * noise, atol=1e-5)


@pytest.mark.parametrize("level", [0.2, 0.7, 1.0])
def test_dropout_blanks_that_share_of_the_pixels(level):
    got, images = np.asarray(corrupt("dropout", IMAGES, level, INDEX)), np.asarray(IMAGES)
    blank = got == 0
    np.testing.assert_array_equal(got[~blank], images[~blank])
    assert abs(blank.mean() - level) < 5 * (level * (1 - level) / blank.size) ** 0.5 + 1e-12


def test_an_unknown_corruption_is_refused():
    with pytest.raises(KeyError, match="blur"):
        jax.jit(lambda: corrupt("blur", IMAGES, 1.0, INDEX))()
