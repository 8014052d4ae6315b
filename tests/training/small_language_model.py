"""A language model that trains in seconds, as the config of `tests.training.small_run`; its text is given by option."""

from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModelConfig
from efla_jax.training.config import Config, DataConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """A hybrid, its batch worked off in two parts."""
    return Config(
        model=LanguageModelConfig(
            features=16, layers=2, hidden=16, mixers=("gated_efla", "softmax"), context=32,
            mixer=MixerConfig(heads=2, key_dim=8, value_dim=8, conv_width=2, activation=True),
            attention=AttentionConfig(heads=2, head_dim=8),
        ),
        data=DataConfig(source="missing.txt", sequence_length=32),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=40),
        train=TrainConfig(steps=6, batch_size=16, parts=2, checkpoint_every=3, log_every=1, seed=5, z_loss=1e-3),
    )  # fmt: skip
