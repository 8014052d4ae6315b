"""Curves from metrics.jsonl: the points, their running mean, the picture, refusals."""

import json

import numpy as np
import pytest

from efla_jax.cli import main
from efla_jax.training.config import ConfigError
from efla_jax.training.plot import plot, read_metric, smooth


@pytest.fixture
def run(tmp_path):
    lines = [{"step": step, "loss": 5.0 / step} | ({"grad_norm": "NaN"} if step % 2 else {}) for step in range(1, 201)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run"


def test_points_are_those_of_the_file(run):
    steps, values = read_metric(run, "loss")
    np.testing.assert_array_equal(steps, np.arange(1, 201))
    np.testing.assert_allclose(values, 5 / steps)
    steps, values = read_metric(run, "grad_norm")
    np.testing.assert_array_equal(steps, np.arange(1, 200, 2))
    assert np.isnan(values).all()


def test_the_running_mean_is_unbiased_at_the_ends():
    np.testing.assert_allclose(smooth(np.ones(300)), 1)
    values = np.arange(300.0)
    np.testing.assert_allclose(smooth(values)[3:-3], values[3:-3])  # windows of 7, whole
    np.testing.assert_allclose(smooth(values)[0], np.mean(values[:4]))


def test_the_command_draws_runs(run, tmp_path, capsys):
    main(["plot", f"--workdir={run},{run}", f"--output={tmp_path / 'loss.png'}"])
    assert capsys.readouterr().out == f"{tmp_path / 'loss.png'}\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("metric", "output", "message"),
    [("los", "a.png", "did you mean 'loss'"), ("loss", "a.nothing", "--output"), ("loss", "missing/a.png", "--output")],
)
def test_refusals(run, tmp_path, metric, output, message):
    with pytest.raises(ConfigError, match=message):
        plot([str(run)], metric, tmp_path / output)


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no metrics"):
        plot([str(tmp_path)], "loss", tmp_path / "a.png")
