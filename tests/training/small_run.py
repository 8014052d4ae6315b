"""What the tests of the training loop share: a run of a few seconds, in this process or in one that can be killed.

Its model is tiny, with dropout, and its pixels are drawn at random: a fixture that stands in for digits and is never
taken for them. As a program, `python -m tests.training.small_run`, this file is the `efla` command on those pixels.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efla_jax import cli
from efla_jax.data import mnist
from efla_jax.layers import MixerConfig
from efla_jax.models import ClassifierConfig
from efla_jax.training.checkpoint import load_newest
from efla_jax.training.config import Config, MeshConfig, OptimizerConfig, TrainConfig
from efla_jax.training.sharding import leaf_name
from efla_jax.training.step import initial_state, make_optimizer, schedule

REPOSITORY = Path(__file__).parents[2]
RECORDS = 20  # with batches of 8, a batch runs across the border of two epochs


def get_config() -> Config:
    """The learning rate rises at each step, so that a step of a wrong number shows."""
    mixer = MixerConfig(heads=2, key_dim=8, value_dim=8, conv_width=2)
    return Config(
        model=ClassifierConfig(pixels_per_token=112, features=16, layers=1, hidden=16, dropout=0.1, mixer=mixer),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=40),
        train=TrainConfig(steps=12, batch_size=8, checkpoint_every=3, log_every=1, keep=3, seed=5),
    )


def small_config(
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    mesh: MeshConfig | None = None,
    **train: Any,
) -> Config:
    """`get_config` with fields of its sections replaced."""
    config = get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **(model or {})),
        optimizer=dataclasses.replace(config.optimizer, **(optimizer or {})),
        train=dataclasses.replace(config.train, **train),
        mesh=mesh or config.mesh,
    )


def random_pixels(split: str, data_dir: object = None) -> tuple[np.ndarray, np.ndarray]:
    """In the form of `mnist.arrays`. Labels are drawn as well."""
    del data_dir
    draw = np.random.default_rng(("train", "test").index(split))
    images = draw.integers(0, 256, (RECORDS, 28, 28), np.uint8)
    return images, draw.integers(0, 10, RECORDS).astype(np.int32)


def metric_lines(workdir: Path) -> list[str]:
    """The lines of metrics.jsonl as they stand, but for tokens_per_second, which is wall time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    stripped = [re.sub(r', "tokens_per_second": [^,}]+', "", line) for line in lines]
    assert all(len(line) < len(whole) for line, whole in zip(stripped, lines, strict=True))
    return stripped


def metric(workdir: Path, name: str) -> list[Any]:
    return [json.loads(line)[name] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoint_names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def state_digests(state: Any) -> dict[str, str]:
    """Name of each leaf -> sha256 of its bytes."""

    def digest(leaf: jax.Array) -> str:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()

    return {leaf_name(path): digest(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def checkpoint_digests(workdir: Path, config: Config) -> dict[str, str]:
    """The newest checkpoint: digests of parameters, moments, key and step, and the data position as it stands."""
    optimizer = make_optimizer(config.optimizer, schedule(config.optimizer, config.train.steps))
    form = jax.eval_shape(lambda: initial_state(config, jax.random.key(0), optimizer))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = load_newest(
        workdir / "checkpoints",
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), form),
    )
    assert loaded is not None
    state, step = loaded
    position = (workdir / "checkpoints" / str(step) / "data" / "position.json").read_text()
    return state_digests(state) | {"number of the checkpoint": str(step), "data": position}


def file_digests(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file()
    }


def start(workdir: Path, *options: str, devices: int) -> subprocess.Popen[str]:
    """`efla train` of `get_config` in a process of its own, on so many simulated devices; both outputs are pipes."""
    command = [sys.executable, "-m", "tests.training.small_run", "train"]
    return subprocess.Popen(
        [*command, f"--config={__file__}", f"--workdir={workdir}", *options],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Waits for the child, which must succeed; returns its outputs."""
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    return output, errors


if __name__ == "__main__":
    mnist.arrays = random_pixels
    cli.main()
