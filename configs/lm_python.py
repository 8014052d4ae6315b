"""A byte-level language model of the Python standard library's own source: needs no download.

Command:  efla train --config=configs/lm_python.py --workdir=runs/lm_python
          efla generate --workdir=runs/lm_python --prompt='def main(' --max_new_tokens=160
Result:   1.88 bits per byte on python:validation after 3.1M bytes (efla, one seed), 410 seconds with start and
          evaluation, on 2 CPU cores (AMD EPYC, shared, 2026-11-24, commit e92051f)
"""

from efla_jax.models.presets import preset
from efla_jax.training.config import Config, DataConfig, OptimizerConfig, TrainConfig


def get_config(mixer: str = "efla") -> Config:
    """mixer: any of `efla_jax.models.language_model.MIXERS`, or several, "efla+softmax", repeated over the blocks."""
    return Config(
        model=preset("tiny", mixers=tuple(mixer.split("+"))),
        data=DataConfig(source="python:train", validation="python:validation", tokenizer="bytes", sequence_length=256),
        optimizer=OptimizerConfig(
            peak_lr=3e-3,
            schedule="cosine",
            warmup_steps=75,
            end_lr=3e-4,
            weight_decay=0.1,
            decayed="matrices",
            beta2=0.95,
        ),
        train=TrainConfig(steps=750, batch_size=16, checkpoint_every=250, log_every=50),
    )
