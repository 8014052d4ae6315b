"""What the tests of evaluation compare with: losses of a small model, token by token."""

import functools

import numpy as np

from tests.inference.small import parameters, programs

SEPARATOR = 256  # of the byte tokenizer


@functools.cache
def _decode(config):
    forward, params = programs(config, (1,), (1,)).forward, parameters(config)
    return lambda token, cache: forward(params, np.array([[token]], np.int32), np.ones(1, np.int32), cache)


def logits(config, inputs):
    """Of the token behind each input, read one by one from the beginning of a row; float64 [T, vocab]."""
    cache, rows = programs(config, (1,), (1,)).empty_cache(1), []
    for token in inputs:
        row, cache = _decode(config)(token, cache)
        rows.append(np.asarray(row, np.float64)[0])
    return np.array(rows).reshape(len(rows), config.vocab_size)


def losses(config, inputs, targets):
    """-log p of each target behind the inputs up to its own, [T] in nats."""
    rows = logits(config, inputs)
    most = rows.max(axis=1)
    lse = most + np.log(np.exp(rows - most[:, None]).sum(axis=1))
    return lse - rows[np.arange(len(rows)), list(targets)]


def pair_by_hand(config, context, continuation):
    """(log p, greedy) of a continuation's bytes behind the separator and the context's, of the last that fit."""
    row = [SEPARATOR, *(context + continuation).encode()]
    if config.reach is not None:
        row = row[-(config.reach + 1) :]
    count = len(continuation.encode())
    total = -losses(config, row[:-1], row[1:])[-count:].sum()
    return total, bool((logits(config, row[:-1]).argmax(axis=1)[-count:] == row[-count:]).all())
