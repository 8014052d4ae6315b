"""What is trained in each type: the paper's sequential MNIST, and a language model of bytes on WikiText-2.

All data of a task lie on the device; a batch is a few indices into them.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from efla_jax.choices import Dtype
from efla_jax.data import mnist
from efla_jax.data.text.packing import PackedRows
from efla_jax.data.text.sources import open_source
from efla_jax.data.text.store import tokenise
from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.evaluation.op_accuracy import Case
from efla_jax.evaluation.op_speed import BOTH, work
from efla_jax.models import LanguageModelConfig, LastStateConfig
from efla_jax.training.config import Config, load_config

RULES = ("efla", "deltanet")
TYPES = ("float32", "bfloat16", "float16")
Columns = dict[str, np.ndarray]  # of a data set: name -> [records, ...]


@dataclass(frozen=True)
class Sizes:
    """What a smaller machine may want otherwise: steps; rows, blocks, width and tokens of the language model."""

    steps: int = 10_000
    batch: int = 16
    layers: int = 2
    features: int = 256
    length: int = 512


def smnist_config(rule: str, dtype: str, sizes: Sizes) -> Config:
    """configs/smnist_paper.py, for so many steps."""
    config = load_config(f"configs/smnist_paper.py:{rule}")
    model = dataclasses.replace(cast(LastStateConfig, config.model), dtype=cast(Dtype, dtype))
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, steps=sizes.steps))


def language_config(rule: str, dtype: str, sizes: Sizes) -> Config:
    """configs/lm_wikitext2.py on bytes, of fewer blocks and for so many steps. float32 names `xla`: the kernels would
    decline it with a warning."""
    config = load_config(f"configs/lm_wikitext2.py:{rule}")
    model = cast(LanguageModelConfig, config.model)
    implementation = "xla" if dtype == "float32" else None
    model = dataclasses.replace(
        model, vocab_size=load_tokenizer("bytes").vocab_size, features=sizes.features, layers=sizes.layers,
        hidden=5 * sizes.features // 2, dtype=cast(Dtype, dtype), context=sizes.length,
        mixer=dataclasses.replace(model.mixer, heads=max(1, sizes.features // 64), implementation=implementation),
    )  # fmt: skip
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, tokenizer="bytes", sequence_length=sizes.length),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=max(1, sizes.steps // 10)),
        train=dataclasses.replace(config.train, steps=sizes.steps, batch_size=sizes.batch),
    )


CONFIGS = {"smnist": smnist_config, "wikitext2": language_config}


def digits(path: str) -> tuple[Columns, Columns]:
    """(train, test) of sequential MNIST from a file that `python -m experiments.numerics.digits` wrote."""
    with np.load(path) as arrays:
        part = lambda split: {"image": arrays[f"{split}_images"], "label": arrays[f"{split}_labels"]}
        return part("train"), part("test")


def write_digits(path: Path, data_dir: str | None = None) -> None:
    """The digits as one file of 11 MB, for a machine without TFDS."""
    arrays: dict[str, Any] = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = mnist.arrays(split, data_dir)
    np.savez_compressed(path, **arrays)


def text_rows(folder: str, length: int) -> tuple[Columns, Columns]:
    """(train, valid): all rows of `length` bytes of FOLDER/train.txt.xz, the first 256 of valid.txt.xz."""
    tokenizer, parts = load_tokenizer("bytes"), []
    with tempfile.TemporaryDirectory() as cache:
        for split, most in (("train", None), ("valid", 256)):
            store = tokenise(open_source(str(Path(folder) / f"{split}.txt.xz")), tokenizer, cache)
            rows = PackedRows(store, length, tokenizer.separator)
            taken = [rows[number] for number in range(len(rows))[:most]]
            parts.append({name: np.stack([row[name] for row in taken]) for name in taken[0]})
    return parts[0], parts[1]


def order(records: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """[steps, batch] indices: one shuffle of all records after another."""
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch // records)
    shuffled = np.concatenate([rng.permutation(records) for _ in range(passes)])
    return shuffled[: steps * batch].reshape(steps, batch).astype(np.int32)


def estimate(config: Config, params: Any) -> dict[str, float]:
    """Bytes and FLOPs of a training step at least: 6 for each weight of a matrix and token, the ops of
    `op_speed.work`, and of bytes, besides those ops, three passes over four float32 arrays of the parameters (weights,
    gradients, two moments). Activations between the products are not counted."""
    model, batch = config.model, config.train.batch_size
    language = isinstance(model, LanguageModelConfig)
    tokens = batch * config.record_tokens
    heads, dim = (model.mixer.heads, model.mixer.key_dim) if language else (1, cast(LastStateConfig, model).features)
    case = Case(batch, config.record_tokens, heads, dim, dim, dtype=str(getattr(model, "dtype", "float32")))
    op = work(case, BOTH)
    layers = model.layers if language else 1
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    if not language:  # a learned position is added, not multiplied
        weights -= config.record_tokens * dim
    return {
        "flops": 6.0 * weights * tokens + layers * op["flops"],
        "bytes": layers * op["bytes"] + 12.0 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
