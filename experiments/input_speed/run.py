"""Times the text pipeline: tokens into the cache, and rows of pairs out of it in batches.

python -m experiments.input_speed.run [--source=python:train] [--vocab_size=4096] [--repeats=5] [--output=DIR]

The source is tokenised into an empty cache, then read from it, by bytes and by a byte-level BPE of its own. Batches are
drawn for a second in each repeat. Both are done once untimed before. Nothing else of a step runs meanwhile: compare
with the tokens a second that a step takes.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from efla_jax.data.pipeline import batches
from efla_jax.data.text.packing import PackedRows
from efla_jax.data.text.sources import TextSource, open_source
from efla_jax.data.text.store import TokenStore, tokenise
from efla_jax.data.text.tokenizers import Tokenizer, load_tokenizer, train_bpe
from experiments.provenance import provenance

_SOURCE = flags.DEFINE_string("source", "python:train", "a text source")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "tokens of the BPE", lower_bound=257)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "folder of results.json and results.md")

_SHAPES = ((32, 512), (8, 2048))  # batch, length
_SECONDS = 1.0

type Figures = dict[str, list[float]]


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def _tokenising(source: TextSource, tokenizer: Tokenizer, repeats: int) -> Figures:
    """MB of text a second, made and read again."""
    speeds: Figures = {"tokenise, MB/s": [], "reuse the cache, MB/s": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for values in speeds.values():
                seconds, store = _timed(lambda cache=cache: tokenise(source, tokenizer, cache))
                values.append(store.text_bytes / seconds / 1e6)
    return speeds


def _batching(store: TokenStore, separator: int, repeats: int) -> Figures:
    """Million tokens a second of each shape of batch."""
    speeds: Figures = {}
    for batch, length in _SHAPES:
        data = batches(PackedRows(store, length, separator, seed=0), batch_size=batch, seed=0)
        values = speeds[f"batches of {batch} × {length}, Mtoken/s"] = []
        for _ in range(1 + repeats):
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < _SECONDS:
                next(data)
                count += 1
            values.append(count * batch * length / (time.perf_counter() - begun) / 1e6)
        del values[0]
    return speeds


def measure(spec: str, vocab_size: int, repeats: int) -> dict[str, Figures]:
    """The figures of each tokenizer, one a repeat."""
    source = open_source(spec)
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bpe.json")
        seconds, _ = _timed(lambda: train_bpe(source, vocab_size, path))
        tokenizers = {"bytes": load_tokenizer("bytes"), f"BPE of {vocab_size}": load_tokenizer(path)}
        for name, tokenizer in tokenizers.items():
            store = tokenise(source, tokenizer, folder)
            figures[name] = {"text, MB": [store.text_bytes / 1e6], "tokens, M": [len(store.tokens) / 1e6]}
            figures[name] |= _tokenising(source, tokenizer, repeats)
            figures[name] |= _batching(store, tokenizer.separator, repeats)
    figures[f"BPE of {vocab_size}"]["train the tokenizer, s"] = [seconds]
    return figures


def _table(figures: dict[str, Figures]) -> str:
    lines = ["| tokenizer | | median | least … most |", "|---|---|---|---|"]
    for tokenizer, rows in figures.items():
        for name, values in rows.items():
            spread = f"{min(values):.2f} … {max(values):.2f}" if len(values) > 1 else ""
            lines.append(f"| {tokenizer} | {name} | {np.median(values):.2f} | {spread} |")
    return "\n".join(lines)


def main(_) -> None:
    figures = measure(_SOURCE.value, _VOCAB_SIZE.value, _REPEATS.value)
    options = f"--source={_SOURCE.value} --vocab_size={_VOCAB_SIZE.value} --repeats={_REPEATS.value}"
    facts = provenance(f"python -m experiments.input_speed.run {options}")
    table = _table(figures)
    folder = Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(facts | {"figures": figures}, indent=1) + "\n")
    header = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    (folder / "results.md").write_text(f"# Speed of the text pipeline\n\n{header}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    app.run(main)
