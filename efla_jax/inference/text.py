"""Text in, text out: a model with its tokenizer."""

import operator
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from efla_jax.data.text.tokenizers import Tokenizer
from efla_jax.inference import InferenceError
from efla_jax.inference.engine import Engine, Request
from efla_jax.inference.prefill import prefill
from efla_jax.inference.programs import JittedPrograms, Programs, read_slot
from efla_jax.inference.sampling import Sampling
from efla_jax.inference.state import Fingerprints, State, load_state
from efla_jax.models import LanguageModelConfig

# Tokens of a completion that the device draws without waiting for the host, where nobody waits for each of them.
_BURST = 32
_TAIL = 16  # tokens of a prompt that its decoder reads before the completion's: enough for a character


class TextModel:
    """A language model, its parameters, its tokenizer, and the programs that run it (compiled when first needed).

    A text is fed as the tokenizer's separator, which begins every document, and its tokens; a completion ends at the
    next separator.
    """

    def __init__(
        self, config: LanguageModelConfig, params: Any, tokenizer: Tokenizer, programs: Programs | None = None
    ):
        if tokenizer.vocab_size > config.vocab_size:
            raise InferenceError(
                f"tokenizer {tokenizer.name!r} has vocab_size {tokenizer.vocab_size}, the model {config.vocab_size}; "
                "the model's must be at least the tokenizer's: it was trained with another one"
            )
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.programs = programs or JittedPrograms(config)
        self._fingerprints = Fingerprints(config, params, tokenizer.fingerprint)

    def generate[Texts: (str, list[str])](
        self,
        prompts: Texts,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        state: State | None = None,
    ) -> Texts:
        """The completion of a prompt, or of each of several, without the prompt.

        Args:
            prompts: texts; they run in one batch and do not influence each other. "" begins a new document.
            max_new_tokens: the most tokens of a completion; it ends before where a separator or a stop string comes.
            temperature: 0 takes the likeliest token each time; else the logits are divided by it.
            top_k: draws from so many likeliest tokens; 0 from all.
            top_p: draws from the fewest likeliest tokens of this probability together.
            stop: strings that end a completion; they are no part of it.
            seed: of what is drawn, one for all prompts or one for each. Equal seeds and prompts draw alike.
            state: what the prompts go on from, see `prefill`, in place of the beginning of a document.

        Raises:
            ValueError: an argument that does not fit.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(texts)
        if len(seeds) != len(texts):
            raise InferenceError(f"seed has {len(seeds)} entries; it must be one number, or have {len(texts)} of them")
        samplings = [Sampling(temperature, top_k, top_p, each) for each in seeds]
        requests = [
            self._request(text, max_new_tokens, sampling, state)
            for text, sampling in zip(texts, samplings, strict=True)
        ]
        pieces: dict[Request, list[str]] = {request: [] for request in requests}
        for request, piece in self._run(requests, _stops(stop), _BURST):
            pieces[request].append(piece)
        completions: Any = ["".join(pieces[request]) for request in requests]
        return completions[0] if isinstance(prompts, str) else completions

    def stream(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        state: State | None = None,
    ) -> Iterator[str]:
        """The pieces of the completion that `generate` gives, as they come: never half a character or stop string."""
        request = self._request(prompt, max_new_tokens, Sampling(temperature, top_k, top_p, seed), state)
        return (piece for _, piece in self._run([request], _stops(stop), burst=1))

    def prefill(self, prompt: str, *, state: State | None = None) -> State:
        """The state after a text, behind `state` or at the beginning of a document.

        generate(more, …, state=model.prefill(text)) is generate(text + more, …) without reading the text again, where
        the tokens of text + more are those of the text and then those of `more`.
        """
        tokens = self._encode(prompt, state)
        self._check_reach(tokens, 0, state)
        logits_BV, cache = prefill(self.programs, self._prepared, [tokens], [state])
        logits, cache = read_slot((logits_BV, cache), 0)
        before = np.zeros(0, np.int32) if state is None else state.tokens
        return State(tuple(jax.tree.leaves(cache)), logits, np.concatenate([before, tokens]), self._fingerprints)

    def load_state(self, file: str | os.PathLike[str]) -> State:
        """Reads what `state.save(file)` wrote.

        Raises:
            ValueError: the file is missing, no state, truncated, damaged, or of another model or tokenizer.
        """
        return load_state(file, self._fingerprints)

    def _encode(self, text: str, state: State | None) -> np.ndarray:
        if not isinstance(text, str):
            raise InferenceError(f"prompt is a {type(text).__name__}; it must be text (str)")
        tokens = np.asarray(self.tokenizer.encode(text), np.int32)
        if state is None:
            return np.concatenate([np.array([self.tokenizer.separator], np.int32), tokens])
        if state.fingerprints is not self._fingerprints:
            self._fingerprints.require("state", state.fingerprints.model, state.fingerprints.tokenizer)
        return tokens

    def _request(self, text: str, max_new_tokens: int, sampling: Sampling, state: State | None) -> Request:
        if operator.index(max_new_tokens) < 1:
            raise InferenceError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        tokens = self._encode(text, state)
        self._check_reach(tokens, max_new_tokens, state)
        return Request(tokens, max_new_tokens, sampling, state)

    def _check_reach(self, tokens: np.ndarray, max_new_tokens: int, state: State | None) -> None:
        length, reach = len(tokens) + (0 if state is None else len(state.tokens)), self.config.reach
        if reach is not None and length + max_new_tokens > reach:
            raise InferenceError(
                f"the prompt has {length} tokens and max_new_tokens is {max_new_tokens}; together they must be at most "
                f"{reach}, the context of the model's softmax blocks: shorten the prompt or ask for fewer tokens"
            )

    @cached_property
    def _prepared(self) -> Any:
        return self.programs.prepare(self.params)

    def _run(self, requests: Sequence[Request], stops: Sequence[str], burst: int) -> Iterator[tuple[Request, str]]:
        """Pieces of text, none of them empty, as they come."""
        engine = Engine(self.programs, self._prepared, self.tokenizer.vocab_size, slots=len(requests), burst=burst)
        outputs = {request: _Output(self.tokenizer, request, stops) for request in requests}
        for request in requests:
            engine.submit(request)
        while engine.busy:
            for request, token in engine.step():
                # behind the end of a request its burst goes on
                piece = "" if request.done else outputs[request].push(token)
                if piece:
                    yield request, piece


class _Output:
    """Turns a request's tokens into text, up to its end."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stops: Sequence[str]):
        self._separator, self._request = tokenizer.separator, request
        self._left = request.max_new_tokens
        self._decoder = tokenizer.stream()
        self._filter = StopFilter(stops)
        before = request.tokens if request.state is None else np.concatenate([request.state.tokens, request.tokens])
        for token in before[-_TAIL:].tolist():  # what a token's text is may depend on the one before
            self._decoder.push(token)

    def push(self, token: int) -> str:
        """What is certain of the text now; marks the request as done at its end."""
        self._left -= 1
        text = "" if token == self._separator else self._decoder.push(token)
        ends = token == self._separator or self._left == 0
        text = self._filter.push(text + self._decoder.flush() if ends else text)
        self._request.done = ends or self._filter.stopped
        return text + self._filter.flush() if self._request.done else text


class StopFilter:
    """Passes text on up to the first stop string, holding back what may become one.

    Of several, the one that is complete first ends the text, so that pieces of any size give the same.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be passed on now; nothing once stopped."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        most = max((len(stop) for stop in self._stops), default=1) - 1
        starts = range(max(len(text) - most, 0), len(text))
        start = next((i for i in starts if any(stop.startswith(text[i:]) for stop in self._stops)), len(text))
        self._held = text[start:]
        return text[:start]

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise InferenceError(f"stop has {text!r}; it must be a text of at least one character, or several")
    return stops
