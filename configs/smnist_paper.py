"""The paper's sequential MNIST: one layer, one head, one pixel a token, one epoch (arXiv 2512.12602, Fig. 1).

Command:  efla train --config=configs/smnist_paper.py --workdir=runs/smnist_paper
          efla train --config=configs/smnist_paper.py:deltanet --workdir=runs/smnist_paper_deltanet
Figure 1 itself, several seeds at once: experiments/smnist_robustness.
Result:   91.3 ± 0.8 % test accuracy (efla), 92.1 ± 0.6 % (deltanet), 16 seeds; half a minute on one NVIDIA H200
          for all 16 (2026-11-23, commit b9c4bb0f1333; experiments/smnist_robustness)
"""

from efla_jax.models import LastStateConfig
from efla_jax.training.config import Config, DataConfig, OptimizerConfig, TrainConfig


def get_config(rule: str = "efla") -> Config:
    """rule: "efla" (exact, raw keys) or "deltanet" (euler, unit keys)."""
    if rule not in ("efla", "deltanet"):
        raise ValueError(f"the argument of this config is {rule!r}; it must be efla or deltanet")
    exact = rule == "efla"
    return Config(
        model=LastStateConfig(integrator="exact" if exact else "euler", normalize_keys=not exact),
        data=DataConfig(source="mnist"),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        train=TrainConfig(steps=469, batch_size=128, checkpoint_every=100, log_every=10),
    )
