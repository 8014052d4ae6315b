"""python -m experiments.numerics.digits FILE.npz: MNIST as one file, for a machine that has no TFDS and no network."""

import sys
from pathlib import Path

from experiments.numerics.tasks import write_digits

if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
