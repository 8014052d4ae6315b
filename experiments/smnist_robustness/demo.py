"""The demo: two small EFLA and DeltaNet classifiers learn sequential MNIST on a CPU, then face corrupted digits.

python -m experiments.smnist_robustness.demo [--output=DIR] [--data_dir=DIR]
"""

import time
from pathlib import Path

from absl import app, flags, logging

from efla_jax.training.config import load_config, override
from experiments.provenance import provenance
from experiments.smnist_robustness.report import table, write
from experiments.smnist_robustness.study import Arm, run_arms

_OUTPUT = flags.DEFINE_string("output", "runs/demo", "folder of the results")
_DATA = flags.DEFINE_string("data_dir", None, "TFDS data directory")
_RULES = ("EFLA", "DeltaNet")
_SHOWN: dict[str, tuple[float, ...]] = {
    "intensity": (1.0, 2.0, 4.0, 7.0, 10.0),
    "noise": (0.0, 0.2, 0.4, 0.7, 1.0),
    "dropout": (0.0, 0.2, 0.5, 0.8),
}


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    begun = time.monotonic()
    logging.set_verbosity(logging.WARNING)
    one_epoch = ["--config.train.steps=469"]
    arms = [Arm(name, override(load_config(f"configs/smnist.py:{name.lower()}"), one_epoch)) for name in _RULES]
    tokens = arms[0].config.record_tokens
    print(f"Training EFLA and DeltaNet on sequential MNIST, {tokens} tokens a digit; a few minutes on two CPU cores.")
    outcome = run_arms(arms, [0], _DATA.value)
    results = provenance("make demo") | {"seeds": 1, "arms": outcome}
    file, picture = write(results, Path(_OUTPUT.value), f"Sequential MNIST, {tokens} tokens a digit")
    print(f"\nTest accuracy in %, clean digits first:\n\n{table(outcome, _SHOWN)}")
    print(f"figure:  {picture.resolve()}\nresults: {file.resolve()}\n{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    app.run(main)
