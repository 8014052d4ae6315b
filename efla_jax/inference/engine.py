"""Decoding of many requests in one running batch, which they join and leave one by one.

The batch has slots: rows of the cache and of what sampling knows. A request that waits is prefilled beside the batch
and written into a free slot while the others go on. Memory is that of the slots, whatever the number of tokens.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from efla_jax.inference.prefill import prefill
from efla_jax.inference.programs import Programs, decode_batch, read_slot, write_slot
from efla_jax.inference.sampling import Rows, Sampling, fresh_rows, sample
from efla_jax.inference.state import State


@dataclass(eq=False)
class Request:
    """tokens int32 [N] to go on from, behind `state` if there is one; only then N may be 0.

    Whoever reads the tokens sets `done` to end the request before max_new_tokens.
    """

    tokens: np.ndarray
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    state: State | None = None
    done: bool = False
    drawn: int = 0  # tokens asked of the device, the one under way counted


class Engine:
    """A running batch of at most `slots` requests; others wait.

    engine.submit(request); while engine.busy: for request, token in engine.step(): …

    Only ids below `vocabulary` are drawn. What a request draws does not depend on the others or on its slot.
    params are best those of `programs.prepare`. burst is how many tokens the device may draw between two looks of the
    host: 1 for text as it is drawn; with more of them the device does not wait for the host, and a request that ends
    early ends that much later.
    """

    def __init__(self, programs: Programs, params: Any, vocabulary: int, slots: int, burst: int = 1):
        self._programs, self._params, self._vocabulary, self._burst = programs, params, vocabulary, burst
        self._batch = decode_batch(programs, slots)
        self._cache, self._rows = programs.empty_cache(self._batch), fresh_rows(self._batch)
        self._slots: list[Request | None] = [None] * min(slots, self._batch)
        self._waiting: deque[Request] = deque()
        self._unread: deque[_Sent] = deque()

    @property
    def busy(self) -> bool:
        """Whether tokens are to come."""
        return bool(self._waiting or self._running or self._unread)

    @property
    def _running(self) -> list[tuple[int, Request]]:
        return [(slot, request) for slot, request in enumerate(self._slots) if request is not None]

    def submit(self, request: Request) -> None:
        """Lets a request wait for a free slot, after those that wait already."""
        self._waiting.append(request)

    def step(self) -> list[tuple[Request, int]]:
        """Admits what waits, starts the next tokens of every running request; returns what is ready, in order.

        It is one token a request, or up to `burst` of them: then some may stand behind one that ended the request.
        Tokens are read one step late: the host works on them while the device computes the next.
        """
        self._leave()
        self._join()
        running = self._running
        if running:
            self._advance(running)
        ready = []
        while len(self._unread) > bool(running):
            ready += self._unread.popleft().read()
        return ready

    def _advance(self, running: list[tuple[int, Request]]) -> None:
        """Starts the next token of these, or a burst where as many are wanted and no slot is waited for."""
        left_B = np.zeros(self._batch, np.int32)
        for slot, request in running:
            left_B[slot] = request.max_new_tokens - request.drawn
        wanted = left_B[[slot for slot, _ in running]]
        if (wanted.min() if self._waiting else wanted.max()) <= self._burst // 2:
            lengths_B = np.minimum(left_B, 1)
            logits_BV, self._cache = self._programs.forward(self._params, self._rows.token, lengths_B, self._cache)
            self._rows = sample(logits_BV, self._rows, self._vocabulary)
            self._sent(self._rows.token, self._batch, running, 1)
            return
        tokens_NB, self._rows, self._cache = self._programs.decode(
            self._params, self._rows, left_B, self._cache, count=self._burst, vocabulary=self._vocabulary,
            drawing=any(request.sampling.temperature > 0 for _, request in running),
        )  # fmt: skip
        self._sent(tokens_NB, self._batch, running, self._burst)

    def _leave(self) -> None:
        for slot, request in self._running:
            if request.done or request.drawn == request.max_new_tokens:
                self._slots[slot] = None

    def _join(self) -> None:
        """Prefills waiting requests, as many as slots are free, and puts them there with their first token drawn."""
        self._waiting = deque(request for request in self._waiting if not request.done)
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        joining = [self._waiting.popleft() for _ in free[: len(self._waiting)]]
        if not joining:
            return
        tokens, states = [request.tokens for request in joining], [request.state for request in joining]
        logits_BV, cache = prefill(self._programs, self._params, tokens, states)
        rows = sample(logits_BV, _rows(joining, len(logits_BV)), self._vocabulary)
        self._sent(rows.token, len(logits_BV), list(enumerate(joining)), 1)
        for row, (slot, request) in enumerate(zip(free, joining, strict=False)):
            if request.drawn < request.max_new_tokens:
                self._cache = write_slot(self._cache, read_slot(cache, row), slot)
                self._rows = _write_row(self._rows, rows, row, slot)
                self._slots[slot] = request

    def _sent(self, tokens: Any, batch: int, places: list[tuple[int, Request]], count: int) -> None:
        wanted = [(slot, request, min(count, request.max_new_tokens - request.drawn)) for slot, request in places]
        self._unread.append(_Sent(tokens, batch, wanted))
        for _, request, number in wanted:
            request.drawn += number


class _Sent(NamedTuple):
    """Tokens that the device was asked for, [B, 1] or [N, B], and whose they are: (row, request, how many)."""

    tokens: Any
    batch: int
    places: list[tuple[int, Request, int]]

    def read(self) -> list[tuple[Request, int]]:
        """Waits for them; those of requests that are done are left out."""
        tokens_NB = np.asarray(self.tokens).reshape(-1, self.batch).tolist()
        return [
            (request, tokens_B[row])
            for number, tokens_B in enumerate(tokens_NB)
            for row, request, count in self.places
            if number < count and not request.done
        ]


@jax.jit
def _write_row(rows: Rows, source: Rows, source_row: int, row: int) -> Rows:
    """As `write_slot`, but that tokens which nobody has read yet keep their buffers."""
    return jax.tree.map(lambda held, new: held.at[row].set(new[source_row]), rows, source)


def _rows(requests: list[Request], batch: int) -> Rows:
    rows = fresh_rows(batch)
    for row, request in enumerate(requests):
        for name in ("temperature", "top_k", "top_p", "seed"):
            getattr(rows, name)[row] = getattr(request.sampling, name)
    return rows
