"""The WikiText-2 study on a few words: what it trains, what it chooses, what it reports."""

import dataclasses
import json

import numpy as np
import pytest

from efla_jax.data.text.sources import open_source
from efla_jax.data.text.store import tokenise
from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModelConfig
from efla_jax.training.config import load_config
from experiments.wikitext2.report import table, write
from experiments.wikitext2.study import run_arm, train_grid

RATES, SEEDS = [1e-3, 1e-2], [0, 1]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    result = {}
    for split, words in (("train", 2000), ("valid", 120), ("test", 120)):
        (folder / f"{split}.txt").write_text(" ".join(draw.choice(["to", "be", "or", "not"], words)))
        result[split] = tokenise(open_source(str(folder / f"{split}.txt")), load_tokenizer("bytes"), folder)
    return result


@pytest.fixture(scope="module")
def config():
    config = load_config("configs/lm_wikitext2.py")
    assert isinstance(config.model, LanguageModelConfig)
    mixer = MixerConfig(heads=2, key_dim=4, value_dim=4)
    attention = AttentionConfig(heads=2, head_dim=4)
    model = LanguageModelConfig(257, 8, 1, 8, mixer=mixer, attention=attention)
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, sequence_length=32),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=2),
        train=dataclasses.replace(config.train, steps=12, batch_size=4),
    )


@pytest.mark.slow
def test_the_grid_is_the_runs_one_by_one(config, stores):
    """Rates and seeds in one program change nothing but rounding, and each rate and seed is what it says."""
    _, together = train_grid(config, stores["train"], 256, RATES, SEEDS, "grid")
    _, alone = train_grid(config, stores["train"], 256, RATES[1:], SEEDS[1:], "one")
    assert together["loss"].shape == (12, 2, 2)
    np.testing.assert_allclose(together["loss"][:, 1, 1], alone["loss"][:, 0, 0], rtol=1e-5)
    for rate, seed in ((0, 0), (0, 1), (1, 0)):  # the others are other runs, by far more than that
        assert np.max(np.abs(together["loss"][:, rate, seed] / alone["loss"][:, 0, 0] - 1)) > 1e-3
    rate = together["learning_rate"]
    np.testing.assert_allclose(rate[:, 1] / RATES[1], rate[:, 0] / RATES[0], rtol=1e-6)
    np.testing.assert_allclose(rate.max(axis=0), np.broadcast_to(np.transpose([RATES]), (2, 2)), rtol=1e-6)
    assert (together["loss"][-1] < together["loss"][0]).all()


def test_the_rate_is_chosen_by_validation_and_reported(config, stores, tmp_path):
    grid = {"rates": RATES, "seeds": SEEDS, "words": {"valid": 121, "test": 121}}
    arm = run_arm("efla", config, stores, 256, grid)
    valid = np.asarray(arm["valid_word_perplexity"])
    assert valid.shape == (2, 2)
    assert arm["rate"] == RATES[int(valid.mean(axis=1).argmin())]
    # 457 bytes in 121 words: a word is worth more than a byte, a uniform guess of 257 is the worst that makes sense
    per_token = np.log(arm["test_word_perplexity"]["packed"]) * 121 / (len(stores["test"].tokens) + 1)
    assert ((per_token > 0.5) & (per_token < np.log(257))).all()
    results = {"rates": RATES, "arms": {"efla": arm, "other": arm}}
    assert "| other | " in table(results)
    write(results, tmp_path, "title")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "figure.png").stat().st_size > 1000
