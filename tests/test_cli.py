"""The `efla` command: help, refusals in one line, and training and evaluation handed to the library."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from efla_jax.cli import COMMANDS, main
from efla_jax.data import mnist
from efla_jax.data.mnist_download import MnistError
from efla_jax.training.config import load_config, to_json

PAPER = "--config=configs/smnist_paper.py"


def refused(capsys, arguments) -> str:
    """The one line that the command ends with, at exit status 2."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"efla {arguments[0]}: ")
    return err


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"], ["-h"], ["train", "--help"], ["evaluate", "-h"]])
def test_help_names_every_command(capsys, arguments):
    main(arguments)
    out = capsys.readouterr().out
    assert all(f"efla {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?; commands: train, evaluate"),
        (["--workdir=x"], "unknown command '--workdir=x'"),
        (["train"], "--config=… is missing"),
        (["train", PAPER], "--workdir=… is missing"),
        (["train", PAPER, "--workdir"], "--workdir needs a value"),
        (["train", PAPER, "--workdir="], "--workdir needs a value"),
        (["train", "--config=configs/smnst.py", "--workdir=x"], "did you mean 'configs/smnist.py'?"),
        (["train", f"{PAPER}:elfa", "--workdir=x"], "'elfa'; it must be efla or deltanet"),
        (["train", PAPER, "--workdir=x", "--config.train.step=3"], "did you mean 'train.steps'?"),
        (["train", PAPER, "--workdir=x", "--config.train.steps=no"], "train.steps"),
        (["train", PAPER, "--workdir=x", "config.train.steps=3"], "'config.train.steps=3' is no option"),
        (["train", PAPER, "--workdir=x", "--config.mesh.data=3"], "must multiply to the 8 devices"),
        (["evaluate"], "--workdir=… is missing"),
        (["evaluate", "--workdir=x", "--data-dir=y"], "unknown option '--data-dir=y'; did you mean '--data_dir'?"),
        (["evaluate", "--workdir=x", "--split=tset"], "--split is 'tset'; it must be train or test"),
        (["evaluate", "--workdir=x"], "--workdir is 'x', which holds no run"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, arguments)


def test_evaluation_without_a_checkpoint(capsys, tmp_path):
    (tmp_path / "config.json").write_text(to_json(load_config("configs/smnist.py")))
    assert "holds no checkpoint" in refused(capsys, ["evaluate", f"--workdir={tmp_path}"])


def test_evaluation_of_a_broken_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "not a config" in refused(capsys, ["evaluate", f"--workdir={tmp_path}"])


def test_missing_digits_are_one_line(capsys, tmp_path, monkeypatch):
    def load(split, data_dir):
        raise MnistError("no digits here")

    monkeypatch.setattr(mnist, "load", load)
    assert "no digits here" in refused(capsys, ["train", PAPER, f"--workdir={tmp_path / 'run'}"])


def test_an_error_of_the_program_itself_is_no_usage_error(monkeypatch):
    def fail(arguments):
        raise RuntimeError("a bug")

    monkeypatch.setitem(COMMANDS, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


TINY = [
    "--config=configs/smnist.py",
    "--config.model.features=8",
    "--config.model.layers=1",
    "--config.model.hidden=8",
    "--config.model.pixels_per_token=196",
    "--config.train.batch_size=16",
    "--config.train.log_every=1",
    "--config.optimizer.schedule=constant",
]


def test_train_and_evaluate(capsys, tmp_path, monkeypatch):
    """On a few random digits: training ends with the test accuracy, which `evaluate` then gives again."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 28, 28)), rng.integers(0, 10, 64)
    digits = (images.astype(np.uint8), labels.astype(np.int32))
    asked = []
    monkeypatch.setattr(mnist, "load", lambda split, data_dir: mnist.Digits(*digits))
    monkeypatch.setattr(mnist, "arrays", lambda split, data_dir: asked.append((split, data_dir)) or digits)
    workdir = f"--workdir={tmp_path / 'run'}"
    main(["train", *TINY, workdir, "--config.train.steps=3", "--config.data.data_dir=digits"])
    trained = capsys.readouterr().out
    assert trained.startswith("step 3: test loss ")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    main(["evaluate", "--workdir", str(tmp_path / "run")])
    assert capsys.readouterr().out == trained
    main(["evaluate", workdir, "--split=train", "--data_dir=elsewhere"])
    assert capsys.readouterr().out == trained.replace("test", "train")
    assert asked == [("test", "digits"), ("test", "digits"), ("train", "elsewhere")]


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "efla_jax", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "efla train --config=" in done.stdout
