"""A language model of 4.8M parameters on WikiText-2 (2M words), one pass over the text, BPE of 4,096 tokens.

Command:  efla tokenizer train --source=DIR/train.txt.xz --vocab_size=4096 --output=DIR/bpe4096.json
          efla train --config=configs/lm_wikitext2.py:efla --workdir=runs/wikitext2
              --config.data.source=DIR/train.txt.xz
              --config.data.validation=DIR/valid.txt.xz --config.data.tokenizer=DIR/bpe4096.json
Result:   experiments/wikitext2, which trains EFLA, DeltaNet and softmax attention with it, several seeds at once
"""

from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModelConfig
from efla_jax.training.config import Config, DataConfig, OptimizerConfig, TrainConfig


def get_config(arm: str = "efla") -> Config:
    """arm: any of `efla_jax.models.language_model.MIXERS`, or several, "efla+softmax", repeated over the blocks; with
    "@0.3" behind it the gates of new blocks have this mean strength, see `MixerConfig.initial_gate`."""
    mixer, _, gate = arm.partition("@")
    model = LanguageModelConfig(
        vocab_size=4096, features=256, layers=5, hidden=640, mixers=tuple(mixer.split("+")), context=1024, tied=True,
        mixer=MixerConfig(
            heads=4, key_dim=64, value_dim=64, conv_width=4, activation=True, initial_gate=float(gate or 0)
        ),
        attention=AttentionConfig(heads=4, head_dim=64, window=256), dtype="bfloat16",
    )  # fmt: skip
    return Config(
        model=model,
        data=DataConfig(source="wikitext2/train.txt.xz", tokenizer="wikitext2/bpe4096.json", sequence_length=512),
        optimizer=OptimizerConfig(
            peak_lr=3e-3,
            schedule="cosine",
            warmup_steps=70,
            end_lr=0.0,
            weight_decay=0.1,
            decayed="matrices",
            beta2=0.95,
        ),
        train=TrainConfig(steps=700, batch_size=8, checkpoint_every=200, log_every=20),
    )
