"""Metrics of a training run: JSON lines, TensorBoard, and a line or a bar for whoever watches.

`DIR/metrics.jsonl` is the record. It holds one object per logged step, `step` first, steps
ascending; floats are the shortest decimals that give the same float64 (so float32 values come back
exactly), and the non-finite ones are the strings "NaN", "Infinity", "-Infinity", which JSON has no
numbers for and `float` reads. A run resumed at a step cuts the file behind that step's line and
goes on: the file is as if the run had never been interrupted, provided that a step's metrics are
written before its checkpoint is saved.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

# Called with a step and its metrics, as Python numbers.
Sink = Callable[[int, dict[str, int | float]], None]

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of one run; a context manager. Only process 0 writes anything.

    `resume_step` is the step of the restored checkpoint, 0 at the start: what `workdir` holds of
    later steps is dropped. `total_steps` is the length of the progress bar.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, total_steps: int, resume_step: int = 0):
        self._last_step = resume_step
        self._sinks: tuple[Sink, ...] = ()
        with ExitStack() as stack:
            if jax.process_index() == 0:
                self._sinks = (
                    _json_lines(stack, Path(workdir) / "metrics.jsonl", resume_step),
                    _tensorboard(stack, Path(workdir) / "tensorboard", resume_step),
                    _progress(stack, total_steps, resume_step),
                )
            self._stack = stack.pop_all()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics (numbers or 0-d arrays) of a step later than the last one."""
        if step <= self._last_step:
            raise ValueError(f"step is {step}; must be later than the last one, {self._last_step}")
        if "step" in metrics:
            raise ValueError("metrics has a value named step; that name is the step's own")
        self._last_step = step
        if self._sinks:
            values = {name: _number(name, value) for name, value in metrics.items()}
            for sink in self._sinks:
                sink(step, values)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"metric {name} has shape {array.shape}; must be a scalar")
    number = array.item()
    return number if isinstance(number, int) else float(number)


def _json_lines(stack: ExitStack, path: Path, resume_step: int) -> Sink:
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_behind(path, resume_step)
    file = stack.enter_context(path.open("a", encoding="utf-8"))

    def write(step: int, values: dict[str, int | float]) -> None:
        line = {"step": step} | {name: _json_value(value) for name, value in values.items()}
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()

    return write


def _json_value(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _cut_behind(path: Path, step: int) -> None:
    """Truncates the file behind the line of `step`; a torn last line, a kill's, goes as well."""
    if not path.exists():
        return
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                later = json.loads(line)["step"] > step
            except (ValueError, TypeError, KeyError):
                if end + len(line) < size:
                    raise ValueError(f"{path}, line {number} is {line!r}; must be an object with a step") from None
                break
            if later or not line.endswith(b"\n"):
                break
            end += len(line)
    if end < size:
        logger.info("%s cut behind step %d: %d bytes dropped", path, step, size - end)
        os.truncate(path, end)  # one system call: there is no half-cut file


def _tensorboard(stack: ExitStack, directory: Path, resume_step: int) -> Sink:
    """Events are flushed every few seconds only, so a kill can leave a gap here."""
    # The suffix keeps a restart within one second from opening the same file anew.
    writer = SummaryWriter(
        str(directory),
        purge_step=resume_step + 1,
        flush_secs=5,
        filename_suffix=f".{resume_step}.{os.getpid()}",
    )
    stack.callback(writer.close)

    def write(step: int, values: dict[str, int | float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write


def _progress(stack: ExitStack, total_steps: int, resume_step: int) -> Sink:
    """A bar on a terminal, else a line per step; on stderr, as stdout is for results."""
    if not sys.stderr.isatty():

        def write_line(step: int, values: dict[str, int | float]) -> None:
            shown = "  ".join(f"{name} {text}" for name, text in _readable(values).items())
            print(f"step {step}/{total_steps}  {shown}", file=sys.stderr, flush=True)

        return write_line
    bar = stack.enter_context(tqdm(total=total_steps, initial=resume_step, unit="step", dynamic_ncols=True))

    def write_bar(step: int, values: dict[str, int | float]) -> None:
        bar.set_postfix(_readable(values), refresh=False)
        bar.update(step - bar.n)

    return write_bar


def _readable(values: dict[str, int | float]) -> dict[str, str]:
    return {name: f"{value:,.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.4g}" for name, value in values.items()}
