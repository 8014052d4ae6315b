"""Figure 1 in the paper's setting.

python -m experiments.smnist_robustness.run [--seeds=3] [--steps=469] [--lr=1e-3,3e-3] [--output=DIR] [--data_dir=DIR]
                                           [--commit=HASH]

Trains one-layer EFLA and DeltaNet on sequential MNIST, 784 tokens of one pixel, for one epoch, at each learning
rate, every arm from the same seeds, and measures accuracy under the three corruptions on all 10,000 test digits.
"""

import dataclasses
from pathlib import Path

from absl import app, flags, logging

from efla_jax.training.config import load_config
from experiments.provenance import provenance
from experiments.smnist_robustness.report import write
from experiments.smnist_robustness.study import Arm, run_arms

_SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds, 0 … N-1", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 469, "training steps; 469 is one epoch", lower_bound=1)
_RATES = flags.DEFINE_list("lr", ["1e-3", "3e-3"], "learning rates, each for both rules")
_OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "folder of the results")
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is run, where this is no git checkout")
_DATA = flags.DEFINE_string("data_dir", None, "TFDS data directory")


def _arm(rule: str, rate: float, steps: int) -> Arm:
    config = load_config(f"configs/smnist_paper.py:{rule}")
    optimizer = dataclasses.replace(config.optimizer, peak_lr=rate)
    config = dataclasses.replace(config, optimizer=optimizer, train=dataclasses.replace(config.train, steps=steps))
    return Arm(f"{'EFLA' if rule == 'efla' else 'DeltaNet'}, lr {rate:g}", config)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    arms = [_arm(rule, float(rate), _STEPS.value) for rate in _RATES.value for rule in ("efla", "deltanet")]
    seeds = list(range(_SEEDS.value))
    options = f"--seeds={_SEEDS.value} --steps={_STEPS.value} --lr={','.join(_RATES.value)}"
    results = provenance(f"python -m experiments.smnist_robustness.run {options}", _COMMIT.value) | {
        "seeds": _SEEDS.value,
        "arms": run_arms(arms, seeds, _DATA.value),
    }
    title = f"Sequential MNIST, one pixel a token, {_STEPS.value} steps of 128, {_SEEDS.value} seeds"
    for path in write(results, Path(_OUTPUT.value), title):
        print(path)


if __name__ == "__main__":
    app.run(main)
