"""The paper's language models, 340M on 8B tokens and 1.3B on 50B (arXiv 2512.12602v4, App. A).

Command:  efla train --config=configs/lm_paper.py:efla/340m --workdir=runs/340m --distributed --config.mesh.fsdp=8
          (mixers: efla, deltanet, gated_efla, gated_deltanet, v4_efla, v4_deltanet, softmax, sliding_window)
Settings: sizes of the paper's framework (`efla_jax/models/presets.py`). AdamW 3e-4, linear from 3e-5 and cosine back
          to it, weight decay 0.1, clipping at 1; batches of 1M (340m) or 2M tokens, warm-up over 1,000 steps. Not
          stated there, chosen here: rows of 2,048 tokens, beta2 0.95, the starting gate as initialised. The source
          needs the extras hf and sentencepiece and a network.
Result:   not trained yet.
"""

import dataclasses

from efla_jax.models.presets import preset
from efla_jax.training.config import Config, DataConfig, OptimizerConfig, TrainConfig

_ROW = 2048
_SIZES = {"340m": (2**20, 8_000), "1.3b": (2**21, 25_000)}  # tokens a batch, steps


def get_config(arm: str = "efla/340m") -> Config:
    """arm: MIXER/SIZE, or MIXER for 340m. MIXER: of `efla_jax.models.language_model.MIXERS`, several joined by "+"."""
    mixers, _, size = arm.partition("/")
    size = size or "340m"
    if size not in _SIZES:
        raise ValueError(
            f"the argument of this config is {arm!r}; it must be MIXER/SIZE, SIZE one of {', '.join(_SIZES)}"
        )
    tokens, steps = _SIZES[size]
    return Config(
        model=dataclasses.replace(preset(size, mixers=tuple(mixers.split("+"))), remat="dots"),
        data=DataConfig(source="hf:cerebras/SlimPajama-627B:train", tokenizer="mistral", sequence_length=_ROW),
        optimizer=OptimizerConfig(
            peak_lr=3e-4, start_lr=3e-5, end_lr=3e-5, schedule="cosine", warmup_steps=1000, weight_decay=0.1,
            beta2=0.95, decayed="matrices",
        ),
        train=TrainConfig(steps=steps, batch_size=tokens // _ROW, parts=8, checkpoint_every=500, log_every=10),
    )  # fmt: skip
