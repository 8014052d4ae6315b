"""What a run trains on: the records of its config's source, and for text the tokenizer."""

from dataclasses import dataclass
from typing import Any

from efla_jax.data import mnist
from efla_jax.data.text.packing import PackedRows
from efla_jax.data.text.sources import open_source
from efla_jax.data.text.store import TokenStore, tokenise
from efla_jax.data.text.tokenizers import Tokenizer, load_tokenizer
from efla_jax.models import LanguageModelConfig
from efla_jax.training.config import Config, ConfigError, DataConfig


@dataclass(frozen=True)
class Records:
    """source: random access to records, dicts of arrays. Of text: the tokenizer, and the digest of all tokens."""

    source: Any
    tokenizer: Tokenizer | None = None
    digest: str = ""


def open_records(config: Config) -> Records:
    """The training records of a config.

    Raises:
        ConfigError: the tokenizer has more tokens than the model, or a row more than softmax blocks look back on.
        TextError, MnistError: the source cannot be had.
    """
    if not isinstance(config.model, LanguageModelConfig):
        return Records(mnist.load("train", config.data.data_dir))
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config.model)
    if config.model.reach is not None and config.data.sequence_length > config.model.reach:
        raise ConfigError(
            f"config.data.sequence_length is {config.data.sequence_length}; it must be at most "
            f"config.model.context = {config.model.reach}, what softmax blocks look back on"
        )
    store = text_store(config.source, config.data, tokenizer)
    rows = PackedRows(store, config.data.sequence_length, tokenizer.separator, config.train.seed)
    return Records(rows, tokenizer, store.digest)


def text_store(spec: str, data: DataConfig, tokenizer: Tokenizer) -> TokenStore:
    """The tokenised text of a source, with the options of `data`."""
    source = open_source(spec, text_field=data.text_field, separator=data.separator)
    return tokenise(source, tokenizer, data.cache_dir)


def check_vocabulary(tokenizer: Tokenizer, model: LanguageModelConfig) -> None:
    """Raises ConfigError unless the model has every token."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size is {model.vocab_size}; it must be at least {tokenizer.vocab_size}, the tokens of "
            f"the tokenizer {tokenizer.name!r}"
        )
