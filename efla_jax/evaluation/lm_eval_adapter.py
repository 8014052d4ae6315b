"""A language model as the harness `lm-eval` (EleutherAI, 0.4.13) asks for one; importing this registers it as "efla".

Text is tokenised as by the harness's own Hugging Face adapter with a tokenizer that adds BOS: the separator comes
before every context, as before every document that the model was trained on; context and continuation are encoded
together and split behind the context's tokens, its trailing white space being the continuation's.

A model of linear blocks takes a context of any length, and a rolling likelihood carries its state through the whole
document. Softmax blocks reach over `config.context` tokens: longer contexts are cut from the left, and a document is
scored window by window.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from efla_jax.evaluation import EvaluationError
from efla_jax.inference.load import load
from efla_jax.inference.programs import cache_form, zeros
from efla_jax.inference.text import TextModel
from efla_jax.models import graph_of

BATCH_SIZE = 16
_LEAST_LENGTH = 16
# Tokens of each row that a rolling likelihood takes at a time.
_PIECE = 512
# Logits are held for so many tokens of each row at a time.
_CHUNK = 64
# What a generation task may ask for; `normalize_gen_kwargs` reduces other names of these to them.
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_MOST_NEW_TOKENS = 256  # where a task does not say

Pair = tuple[list[int], list[int]]  # tokens of a context and of what continues it


def bucket(length: int, limit: int | None = None) -> int:
    """The length that `length` tokens are padded to: a power of two, at most `limit`."""
    size = max(_LEAST_LENGTH, 1 << (length - 1).bit_length())
    return size if limit is None else min(size, limit)


def _scores(model: Any, hidden_BTE: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p(target), float32, and whether the target is the likeliest token, both [B, T]."""

    def of_token(column):
        hidden_BE, target_B = column
        logits_BV = model.logits(hidden_BE)
        logit_B = jnp.take_along_axis(logits_BV, target_B[:, None], axis=1)[:, 0]
        return logit_B - jax.nn.logsumexp(logits_BV, axis=1), jnp.argmax(logits_BV, axis=1) == target_B

    logp_TB, likeliest_TB = jax.lax.map(of_token, (hidden_BTE.swapaxes(0, 1), targets_BT.T), batch_size=_CHUNK)
    return logp_TB.T, likeliest_TB.T


@partial(jax.jit, static_argnums=0)
def _whole(graph, params, inputs_BT, targets_BT):
    """`_scores` of rows from their beginnings."""
    model = nnx.merge(graph, params)
    return _scores(model, model(inputs_BT)[0], targets_BT)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _onward(graph, params, cache, inputs_BT, targets_BT):
    """`_scores` of rows that go on from a cache, and the new cache."""
    model = nnx.merge(graph, params)
    hidden_BTE, cache = model(inputs_BT, cache=cache)
    return *_scores(model, hidden_BTE, targets_BT), cache


def _pad(rows: Sequence[Sequence[int]], batch: int, length: int) -> np.ndarray:
    """int32 [batch, length] with the rows from the left, 0 behind them."""
    padded = np.zeros((batch, length), np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


@register_model("efla")
class EflaLM(TemplateLM):
    """model: what `efla_jax.load` returns, or the path that it takes.

    batch_size: rows of each call of a program. Programs are compiled for it and for lengths that are powers of two.
    """

    def __init__(self, model: TextModel | str, batch_size: int | str = BATCH_SIZE):
        super().__init__()
        self.model = load(model) if isinstance(model, str) else model
        self.batch_size = int(batch_size)
        if self.batch_size < 1:
            raise EvaluationError(f"batch_size is {batch_size}; it must be at least 1")
        self._graph = graph_of(self.model.config)

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.separator

    @property
    def max_length(self) -> int | None:
        """Tokens that a row of inputs may have; None where there is no such limit."""
        return self.model.config.reach

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of the string, behind the separator unless add_special_tokens is False."""
        ids = np.asarray(self.model.tokenizer.encode(string)).tolist()
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each request (its strings, context, continuation): as `loglikelihood` gives it."""
        for strings, _context, continuation in requests:
            if not continuation:
                raise EvaluationError(
                    f"the continuation of {strings!r} has no tokens of its own; there is nothing to score"
                )
            if self.max_length is not None and len(continuation) > self.max_length:
                raise EvaluationError(
                    f"the continuation of {strings!r} has {len(continuation)} tokens; it must have at most "
                    f"{self.max_length}, the context of the model's softmax blocks"
                )
        return self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)

    def _score(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """(log p of the continuation behind the context, whether greedy decoding would give it) of each pair."""
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        answers: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), self.batch_size), desc="loglikelihood", disable=disable_tqdm or None):
            numbers = order[start : start + self.batch_size]
            answers |= zip(numbers, self._score_batch([pairs[number] for number in numbers]), strict=True)
        return [answers[number] for number in range(len(pairs))]

    def _score_batch(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """At most batch_size pairs."""
        rows = [context + continuation for context, continuation in pairs]
        if self.max_length is not None:
            rows = [row[-(self.max_length + 1) :] for row in rows]
        length = bucket(max(map(len, rows)) - 1, self.max_length)
        inputs_BT = _pad([row[:-1] for row in rows], self.batch_size, length)
        targets_BT = _pad([row[1:] for row in rows], self.batch_size, length)
        logp_BT, likeliest_BT = jax.device_get(_whole(self._graph, self.model.params, inputs_BT, targets_BT))
        answers = []
        for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            scored = slice(len(row) - 1 - len(continuation), len(row) - 1)
            total = float(logp_BT[number, scored].sum(dtype=np.float64))
            answers.append((total, bool(likeliest_BT[number, scored].all())))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text behind the separator; what comes after its last token is not scored."""
        tokens = [self.tok_encode(request.args[0]) for request in requests]
        if self.max_length is None:
            return self._carry_through(tokens, disable_tqdm)
        return self._by_windows(tokens, self.max_length, disable_tqdm)

    def _by_windows(self, documents: list[list[int]], length: int, disable_tqdm: bool) -> list[float]:
        """Windows of `length` tokens that do not overlap, as the harness makes them."""
        windows: list[Pair] = []
        owners = []
        for number, (separator, *ids) in enumerate(documents):
            for pair in map(make_disjoint_window, get_rolling_token_windows(ids, separator, length, 1)):
                windows.append(pair)
                owners.append(number)
        totals = [0.0] * len(documents)
        for owner, (logp, _) in zip(owners, self._score(windows, disable_tqdm), strict=True):
            totals[owner] += logp
        return totals

    def _carry_through(self, documents: list[list[int]], disable_tqdm: bool) -> list[float]:
        """Piece after piece of each document, the state carried from one to the next."""
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        totals = [0.0] * len(documents)
        for start in tqdm(range(0, len(order), self.batch_size), desc="rolling", disable=disable_tqdm or None):
            numbers = order[start : start + self.batch_size]
            rows = [documents[number] for number in numbers]
            longest = max(map(len, rows)) - 1
            length = min(_PIECE, bucket(max(longest, 1)))
            cache = zeros(cache_form(self.model.config, self.batch_size))
            for first in range(0, longest, length):
                # a row that ends in this piece needs no cache for another: what pads it does not matter
                pieces = [row[first : first + length + 1] for row in rows]
                inputs_BT = _pad([piece[:-1] for piece in pieces], self.batch_size, length)
                targets_BT = _pad([piece[1:] for piece in pieces], self.batch_size, length)
                logp_BT, _, cache = _onward(self._graph, self.model.params, cache, inputs_BT, targets_BT)
                logp_BT = np.asarray(logp_BT, np.float64)
                for row, piece in enumerate(pieces):
                    totals[numbers[row]] += float(logp_BT[row, : max(len(piece) - 1, 0)].sum())
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each context up to the first of its stop strings, or a separator.

        Contexts that leave a model with softmax blocks no room are cut from the left. Where a task asks for samples,
        a request's seed is its number.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            _context, asked = request.args
            groups.setdefault(json.dumps(asked, sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for key, numbers in tqdm(groups.items(), desc="generate_until", disable=disable_tqdm or None):
            options = self._generation(json.loads(key))
            prompts = [self._fit(requests[number].args[0], options["max_new_tokens"]) for number in numbers]
            for number, text in zip(numbers, self.model.generate(prompts, seed=numbers, **options), strict=True):
                texts[number] = text
        return texts

    @staticmethod
    def _generation(asked: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `TextModel.generate` for what a task asks for."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, _MOST_NEW_TOKENS))
        for name in options:
            if name not in _GENERATION:
                raise EvaluationError(
                    f"generation_kwargs has {name!r}, which is not served; it may have {', '.join(_GENERATION)}"
                )
        return dict(
            max_new_tokens=options["max_gen_toks"],
            temperature=float(options.get("temperature", 0.0)),
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            stop=[text for text in options["until"] if text],
        )

    def _fit(self, text: str, max_new_tokens: int) -> str:
        """The end of the text that leaves the model room for the separator and so many new tokens."""
        if self.max_length is None:
            return text
        room = self.max_length - max_new_tokens - 1
        if room < 0:
            raise EvaluationError(
                f"max_gen_toks is {max_new_tokens}; it must be less than {self.max_length}, the context of the model's "
                "softmax blocks"
            )
        ids = self.tok_encode(text, add_special_tokens=False)
        kept = room
        while len(self.tok_encode(text, add_special_tokens=False)) > room:  # tokens at the cut may come out anew
            text = self.model.tokenizer.decode(ids[len(ids) - kept :])
            kept -= 1
        return text
