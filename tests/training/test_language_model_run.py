"""Runs of language models in one process: resumed bit for bit, then evaluated and asked; what they refuse."""

import dataclasses
import json

import numpy as np
import pytest

from efla_jax.cli import main
from efla_jax.data.text.sources import open_source
from efla_jax.data.text.tokenizers import load_tokenizer, train_bpe
from efla_jax.models import LanguageModelConfig
from efla_jax.training.config import Config, ConfigError, DataConfig
from efla_jax.training.loop import keep_tokenizer, train
from efla_jax.training.records import open_records
from tests.training import small_language_model
from tests.training.small_run import checkpoint_digests, metric, metric_lines


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0).choice(["to", "be", "or", "not"], (9, 150))
    for number, document in enumerate(words):
        (folder / f"{number}.txt").write_text(" ".join(document[: 20 + 15 * number]))
    return folder


def config_of(text, steps: int, sequence_length: int = 32) -> Config:
    config = small_language_model.get_config()
    data = DataConfig(
        source=f"{text}/*.txt",
        validation=f"{text}/8.txt",
        cache_dir=f"{text}/cache",
        sequence_length=sequence_length,
    )
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, steps=steps))


@pytest.fixture(scope="module")
def whole(text):
    """The workdir of a whole run of six steps."""
    assert train(config_of(text, 6), text / "whole") == 6
    return text / "whole"


def test_resumed_it_goes_on_bit_for_bit(text, whole):
    workdir = text / "resumed"
    assert train(config_of(text, 4), workdir) == 4
    assert train(config_of(text, 6), workdir) == 6
    assert metric_lines(workdir) == metric_lines(whole)
    config = config_of(text, 6)
    assert checkpoint_digests(workdir, config) == checkpoint_digests(whole, config)
    assert len(set(metric(whole, "loss"))) == 6
    # of the two blocks one has a gate; it starts between nothing and all
    (gate,) = (name for name in json.loads(metric_lines(whole)[0]) if name.startswith("gate/"))
    assert gate == "gate/00"
    assert 0 < metric(whole, gate)[0] < 1


def test_what_was_trained_can_be_evaluated_and_asked(whole, capsys):
    main(["evaluate", f"--workdir={whole}"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["step"] == "6"
    assert 1 < float(lines["loss"]) < np.log(257)
    ask = ["--prompt=to be", "--max_new_tokens=8", "--temperature=0"]
    main(["generate", f"--workdir={whole}", *ask])
    completion = capsys.readouterr().out
    main(["export", f"--workdir={whole}", f"--output={whole / 'exported'}", "--platforms=cpu", "--batch_sizes=1"])
    capsys.readouterr()
    main(["generate", f"--artifact={whole / 'exported'}", *ask])
    assert capsys.readouterr().out == completion


def test_a_vocabulary_larger_than_the_models(text, tmp_path):
    config = config_of(text, 6)
    assert isinstance(config.model, LanguageModelConfig)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=256))
    with pytest.raises(ConfigError, match=r"vocab_size is 256; it must be at least 257, .* tokenizer 'bytes'"):
        train(config, tmp_path / "run")


def test_a_run_keeps_its_tokenizer(text, tmp_path):
    """A file of the same name that holds another tokenizer is noticed."""
    bpe = tmp_path / "bpe.json"
    train_bpe(open_source(f"{text}/*.txt"), 260, bpe)
    for _ in range(2):
        keep_tokenizer(tmp_path, load_tokenizer(bpe))
    train_bpe(open_source(f"{text}/*.txt"), 262, bpe)
    with pytest.raises(ConfigError, match=r"not the one that .* was begun with"):
        keep_tokenizer(tmp_path, load_tokenizer(bpe))


def test_rows_longer_than_softmax_looks_back(text):
    with pytest.raises(ConfigError, match=r"sequence_length is 33; it must be at most config\.model\.context = 32"):
        open_records(config_of(text, 6, sequence_length=33))


def test_rows_shorter_than_two(text):
    with pytest.raises(ConfigError, match=r"sequence_length is 1; it must be at least 2"):
        config_of(text, 6, sequence_length=1)
