"""Language models trained by two real processes: as by one; lost and restarted bit for bit; on texts that differ."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from efla_jax.training.loop import train
from tests.training import small_language_model
from tests.training.small_run import checkpoint_digests, checkpoint_names, metric, metric_lines, start
from tests.training.test_processes import PATIENCE, finished, last_line, none_left, processes

STEPS = 30


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["to", "be", "or", "not"], (9, 150))
    for number, document in enumerate(words):
        (tmp_path / f"{number}.txt").write_text(" ".join(document[: 20 + 15 * number]))
    return tmp_path


def options(text: Path, steps: int) -> list[str]:
    return [
        f"--config={small_language_model.__file__}",
        f"--config.data.source={text}/*.txt",
        f"--config.data.cache_dir={text}/cache",
        f"--config.train.steps={steps}",
    ]


def config_of(text: Path, steps: int):
    config = small_language_model.get_config()
    data = dataclasses.replace(config.data, source=f"{text}/*.txt", cache_dir=f"{text}/cache")
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, steps=steps))


@pytest.mark.slow
def test_two_processes_train_as_one_does(text, address):
    """One: this process, with 8 devices against four."""
    with processes([text / "two"] * 2, address, *options(text, 6), devices=2) as children:
        train(config_of(text, 6), text / "one")
        for child in children:
            finished(child)
    for name, rounding in (("loss", 5e-6), ("grad_norm", 5e-5)):  # as in test_processes
        np.testing.assert_allclose(metric(text / "two", name), metric(text / "one", name), rtol=rounding)
    assert len(set(metric(text / "one", "loss"))) == 6
    assert checkpoint_names(text / "two") == ["3", "6"]
    assert [path.name for path in (text / "two" / "tokenizer").iterdir()] == ["tokenizer.json"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_minus_nine_and_all_go_on_bit_for_bit(victim, text, address):
    def run(workdir):
        with processes([workdir] * 2, address, *options(text, STEPS), devices=2) as children:
            for child in children:
                assert last_line(finished(child)).startswith(f"trained to step {STEPS}")

    run(text / "whole")
    with processes([text / "run"] * 2, address, *options(text, STEPS), devices=2) as children:
        deadline = time.monotonic() + PATIENCE
        while not (text / "run" / "checkpoints" / "6").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        children[victim].kill()
        children[1 - victim].communicate(timeout=PATIENCE)
        assert children[1 - victim].returncode != 0
    assert str(STEPS) not in checkpoint_names(text / "run")
    run(text / "run")
    config = config_of(text, STEPS)
    assert metric_lines(text / "run") == metric_lines(text / "whole")
    assert checkpoint_digests(text / "run", config) == checkpoint_digests(text / "whole", config)


@pytest.mark.slow
def test_texts_that_differ_are_refused(text, address, monkeypatch):
    """As where the hosts of a cluster have files of their own under one path."""
    children = []
    for number in range(2):
        home = text / f"host{number}"
        home.mkdir()
        (home / "text.txt").write_text(f"to be or not to be, that is question {number}" * 20)
        monkeypatch.setenv("HOME", str(home))
        cluster = [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={number}"]
        same = [*options(text, 6), "--config.data.source=~/text.txt"]
        children.append(start(text / "run", *cluster, *same, devices=2))
    with none_left(children):
        for child in children:
            _, errors = child.communicate(timeout=PATIENCE)
            assert child.returncode == 2, errors
            assert "the training text differs" in errors
