"""Time of greedy generation by DeltaNet 374M in bfloat16: this library, flash-linear-attention, jax-linear-attention.

python -m experiments.kernels.generation [--batches=1,64] [--implementations=ours:efla,ours:deltanet,fla]
    [--prompt=512] [--tokens=128] [--burst=32] [--repeats=7] [--timeout=420] [--output=DIR] [--commit=HASH]
    [--sizes=layers=2,features=32,…]

The model is that of `train_step`, of random parameters, every row a random prompt. An implementation is of
`generation_models.measure`: ours:RULE, ours:RULE:xla, fla, jla. Each is measured in a process of its own; its row is
printed and written to DIR/generation.json at once.

Prefill: milliseconds from prompts on the host to the first token (ours: to its logits). Step: milliseconds for one
further token of every row; ours in bursts of so many tokens a call of the device, queued; of others what generating
`tokens` takes beyond generating one. Whole: prompt to last token, ours with its engine. Floor: matrices read once and
states read and written once, at the speed of a large copy that the row of this library measures. First batch alone:
relative distance of ours from implementation xla in the logits after the prompt, and after a token more.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.kernels.generation_models import HEADING, completed, line, measure
from experiments.kernels.isolated import Row, facts, measure_to, measured, write
from experiments.kernels.train_models import Sizes, sizes_of

_BATCHES = flags.DEFINE_list("batches", ["1", "64"], "rows side by side")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["ours:efla", "ours:deltanet", "fla"], "see above")
_PROMPT = flags.DEFINE_integer("prompt", 512, "tokens of each prompt", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 128, "tokens to generate", lower_bound=2)
_BURST = flags.DEFINE_integer("burst", 32, "tokens a call of the device", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed repeats; of others at most 3", lower_bound=1)
_TIMEOUT = flags.DEFINE_integer("timeout", 420, "seconds that a row may take", lower_bound=1)
_SIZES = flags.DEFINE_list("sizes", [], "NAME=NUMBER of other sizes of the model: layers, features, heads, …")
_OUTPUT = flags.DEFINE_string("output", None, "folder of generation.json and generation.md")
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is measured, where there is no git to ask")
_ROW = flags.DEFINE_string("row", None, "IMPLEMENTATION@B: measure this one here")
_ROW_FILE = flags.DEFINE_string("row_file", None, "the file that its row goes to")


def _batch(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise app.UsageError(f"batch is {text!r}; it must be a number of at least 1")
    return int(text)


def _here(name: str, sizes: Sizes, batch: int) -> Row:
    """Measures one row in this process."""
    prompts = np.random.default_rng(1).integers(0, sizes.vocabulary, (batch, _PROMPT.value), dtype=np.int32)
    options = dict(burst=_BURST.value, check=batch == _batch(_BATCHES.value[0]))
    return measure(name, sizes, prompts, _TOKENS.value, _REPEATS.value, **options)


def _options() -> list[str]:
    flags_ = dict(prompt=_PROMPT, tokens=_TOKENS, burst=_BURST, repeats=_REPEATS, batches=_BATCHES, sizes=_SIZES)
    text = lambda value: ",".join(value) if isinstance(value, list) else value
    return [f"--{name}={text(flag.value)}" for name, flag in flags_.items() if flag.value]


def _measure_all(sizes: Sizes, folder: Path | None) -> None:
    names, module = _IMPLEMENTATIONS.value, "experiments.kernels.generation"
    command = " ".join([f"python -m {module} --implementations={','.join(names)}", *_options()])
    found: dict[str, Any] = facts(command, _COMMIT.value)
    header = "\n".join(f"- {name}: {value}" for name, value in found.items())
    print(f"{header}\n\n{HEADING}", flush=True)
    rows: list[Row] = []
    bandwidth = None
    for text in _BATCHES.value:
        for name in names:
            row = measured(module, [f"--row={name}@{text}", *_options()], _TIMEOUT.value)
            bandwidth = row.get("bandwidth", bandwidth)
            rows.append(completed(row, name, sizes, _batch(text), bandwidth))
            print(line(rows[-1]), flush=True)
            write(folder, "generation", found, rows)
    if folder:
        table = "\n".join([HEADING, *map(line, rows)])
        (folder / "generation.md").write_text(f"# Time of generation\n\n{header}\n\n{table}\n")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    sizes = sizes_of(_SIZES.value)
    for text in _BATCHES.value:
        _batch(text)
    if _ROW.value and _ROW_FILE.value:
        name, _, text = _ROW.value.partition("@")
        measure_to(_ROW_FILE.value, lambda: _here(name, sizes, _batch(text)))
        return
    _measure_all(sizes, Path(_OUTPUT.value) if _OUTPUT.value else None)


if __name__ == "__main__":
    app.run(main)
