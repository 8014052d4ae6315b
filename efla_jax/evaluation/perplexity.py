"""Loss of a language model on a text: per token, per byte and per word.

Every document is scored on its own, from the separator that begins it to the one that ends it. Protocols:
packed    documents one directly after another, cut into rows of `length`: a row begins without context
sliding   windows of `length` tokens that advance by `stride`, each scoring what no window before it did: every token
          but those of a document's first window has at least length - stride tokens of context
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import grain
import jax
import numpy as np
from flax import nnx

from efla_jax.data.text.packing import PackedRows, Record, evaluation_windows
from efla_jax.data.text.sources import TextSource
from efla_jax.data.text.store import TokenStore, tokenise
from efla_jax.data.text.tokenizers import Tokenizer
from efla_jax.evaluation import EvaluationError
from efla_jax.models import LanguageModelConfig, graph_of
from efla_jax.models.cross_entropy import token_losses
from efla_jax.training.records import check_vocabulary

Protocol = Literal["packed", "sliding"]
Rows = grain.sources.RandomAccessDataSource[Record]
BATCH_SIZE = 8


@dataclass(frozen=True, eq=False)
class Score:
    """Sums over scored tokens by context, the number of tokens of the same document before the token's input.

    nll: negative log-likelihood in nats, float64 [T]; tokens: int64 [T].
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll.sum() / self.tokens.sum())

    def by_context(self) -> list[dict[str, float]]:
        """The loss for contexts of 0, 1, 2-3, 4-7, … tokens; bins without tokens are left out."""
        edges = [0, *(2**power for power in range(len(self.nll).bit_length()))]
        nll, tokens = (np.add.reduceat(np.append(x, 0), np.minimum(edges, len(x))) for x in (self.nll, self.tokens))
        bins = zip(edges, nll.tolist(), tokens.tolist(), strict=True)
        return [{"context": edge, "tokens": count, "loss": total / count} for edge, total, count in bins if count]


def _batches(rows: Rows, batch_size: int) -> Iterator[Record]:
    """Batches of one shape; what fills up the last has nothing to score."""
    for start in range(0, len(rows), batch_size):
        records = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        empty = records[0] | {"targets": np.full_like(records[0]["targets"], -1)}
        records += [empty] * (batch_size - len(records))
        yield {name: np.stack([record[name] for record in records]) for name in empty}


def _contexts(segment_ids_BT: np.ndarray) -> np.ndarray:
    """How many tokens of its document each token has before it in its row, int [B, T]."""
    place_BT = np.broadcast_to(np.arange(segment_ids_BT.shape[1])[None], segment_ids_BT.shape)
    first_BT = np.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    return place_BT - np.maximum.accumulate(np.where(first_BT, place_BT, 0), axis=1)


@partial(jax.jit, static_argnums=0)
def _losses(graph, params, inputs_BT, targets_BT, segment_ids_BT):
    """Nats, float32 [B, T], 0 where there is no target."""
    model = nnx.merge(graph, params)
    hidden_BTE, _ = model(inputs_BT, segment_ids=segment_ids_BT)
    return token_losses(hidden_BTE, model.head_kernel(), targets_BT)


def score(graph: nnx.GraphDef, params: Any, rows: Rows, *, batch_size: int = BATCH_SIZE) -> Score:
    """Scores every target ≥ 0 of rows of one length T, as `PackedRows` and `evaluation_windows` give them.

    One program is compiled for each graph, batch_size and T. Logits exist for a part of T at a time; sums are float64.
    """
    length = len(rows[0]["inputs"])
    nll, tokens = np.zeros(length), np.zeros(length, np.int64)

    def add(batch: Record, losses_BT: jax.Array) -> None:
        scored_BT = batch["targets"] >= 0
        contexts = _contexts(batch["segment_ids"])[scored_BT]
        np.add.at(nll, contexts, np.asarray(losses_BT, np.float64)[scored_BT])
        np.add.at(tokens, contexts, 1)

    pending = None  # the device works on a batch while the host sums the one before
    for batch in _batches(rows, batch_size):
        dispatched = (batch, _losses(graph, params, batch["inputs"], batch["targets"], batch["segment_ids"]))
        if pending:
            add(*pending)
        pending = dispatched
    if pending:
        add(*pending)
    return Score(nll, tokens)


def evaluation_rows(store: TokenStore, separator: int, protocol: Protocol, length: int, stride: int) -> Rows:
    """The rows of a protocol, in the documents' order."""
    if protocol == "packed":
        return PackedRows(store, length, separator, seed=None)
    return evaluation_windows(store, length, stride, separator)


def line_ends(source: TextSource) -> int:
    """Lines of all documents; a last line without a newline is one."""
    return sum(text.count("\n") + (not text.endswith("\n")) for text in source.documents())


def perplexity(
    config: LanguageModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    source: TextSource,
    *,
    protocol: Protocol = "packed",
    length: int,
    stride: int | None = None,
    words: int | None = None,
    batch_size: int = BATCH_SIZE,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Loss and perplexities of one model on a source.

    length: tokens a row; stride: of protocol "sliding", half of length by default. words: what word_perplexity is
    per; by default the source's words, parted by white space, and one end of line for each line, as WikiText-2 is
    reported. cache_dir: of tokenised text.

    Returns {"protocol", "length", "stride", "documents", "tokens", "bytes", "words", "loss": nats per token,
    "perplexity": per token, "bits_per_byte", "word_perplexity", "by_context": see `Score.by_context`}. tokens counts
    what was scored: every token of the text, and the separator that ends each document.

    Raises:
        EvaluationError: protocol, length, stride, words or batch_size is out of range. TextError: of the source.
        ConfigError: the tokenizer has more tokens than the model.
    """
    check_vocabulary(tokenizer, config)
    stride = _check_windows(config, protocol, length, stride)
    for name, value in (("batch_size", batch_size), ("words", words)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} is {value}; it must be at least 1")
    store = tokenise(source, tokenizer, cache_dir)
    rows = evaluation_rows(store, tokenizer.separator, protocol, length, stride)
    result = score(graph_of(config), params, rows, batch_size=batch_size)
    total = float(result.nll.sum())
    words = store.text_words + line_ends(source) if words is None else words
    return {
        "protocol": protocol,
        "length": length,
        "stride": stride,
        "documents": store.documents,
        "tokens": int(result.tokens.sum()),
        "bytes": store.text_bytes,
        "words": words,
        "loss": result.loss,
        "perplexity": _exp(result.loss),
        "bits_per_byte": total / math.log(2) / store.text_bytes,
        "word_perplexity": _exp(total / words),
        "by_context": result.by_context(),
    }


def _check_windows(config: LanguageModelConfig, protocol: Protocol, length: int, stride: int | None) -> int:
    """The stride, where none is given the protocol's. Raises EvaluationError."""
    if protocol not in get_args(Protocol):
        raise EvaluationError(f"protocol is {protocol!r}; it must be {' or '.join(get_args(Protocol))}")
    if length < 2:
        raise EvaluationError(f"length is {length}; it must be at least 2")
    if config.reach is not None and length > config.reach:
        raise EvaluationError(
            f"length is {length}; it must be at most {config.reach}, the context of the softmax blocks"
        )
    if protocol == "packed":
        if stride is not None:
            raise EvaluationError(f"stride is {stride}, which protocol 'packed' does not have; its rows do not overlap")
        return length
    stride = length // 2 if stride is None else stride
    if not 1 <= stride <= length:
        raise EvaluationError(f"stride is {stride}; it must be in [1, length = {length}]")
    return stride


def _exp(nats: float) -> float:
    """exp, infinite where a float has no such number."""
    return math.exp(nats) if nats < 709 else math.inf
