"""Implementations × shapes × directions on one device, beside other libraries' kernels of the same function.

python -m experiments.kernels.benchmark [--implementations=pallas_gpu,xla,jla,…] [--shapes=8x2048x16x128,…]
    [--directions=forward,both] [--repeats=15] [--dtype=bfloat16] [--output=DIR] [--commit=HASH] [--[no]kernel_time]
    [--processes=1]

An implementation is one of this library (`xla`), one with another rule (`xla:euler`, `xla:delta_rule`: erase and write
given), or a peer; shapes are BxTxHxD or BxTxHxKxV, with `pN` behind for N packed documents, `kN` where this library
knows when tracing where they begin (a peer that takes lengths is told them in both). A forward gives output and
state, `both` the output and the gradients of query, key, value, beta for a given cotangent of the output.

Time of a call: the host's clock around many queued calls, on sets of inputs larger than the caches. Kernel time: the
sum of what ran on the GPU for one call, by the profiler. Errors: relative, against the token loop in float64 on the
same numbers, for some rows and heads. A row is printed as soon as it is measured, and results.json written again.

Each shape has a process of its own. So many (--processes) at once compile and compute references side by side; once all
of them are done, they measure one after the other, and nothing else runs.
"""

import fcntl
import gc
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import queue
import re
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

from efla_jax.errors import UserError
from efla_jax.evaluation.comparison import Bench, Candidate, Row, declined, implementation, measure, split_name
from efla_jax.evaluation.op_accuracy import Case
from efla_jax.evaluation.op_report import HEADING, ceilings_text, line, plot, table
from efla_jax.evaluation.op_speed import BOTH, FORWARD, ceilings
from experiments.kernels.peers import PACKAGES, PEERS, TIMES_ITSELF, peer
from experiments.provenance import provenance

_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", ["pallas_gpu", "triton", "xla", *PEERS], "names, NAME:RULE too; the first is 1x"
)
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["8x2048x16x128", "4x4096x16x128", "2x8192x16x128", "1x16384x16x128", "1x16384x16x128p16", "1x16384x16x128k16",
     "1x65536x16x128", "16x2048x16x64", "1x8192x8x128"],
    "BxTxHxD or BxTxHxKxV, pN behind for N packed documents, kN for known ones",
)  # fmt: skip
_DIRECTIONS = flags.DEFINE_list("directions", ["forward", "both"], "forward, both (forward + backward)")
_REPEATS = flags.DEFINE_integer("repeats", 15, "timed repeats of each", lower_bound=1)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "type of query, key and value")
_KERNEL_TIME = flags.DEFINE_bool("kernel_time", True, "measure the time of kernels by the profiler too")
_OUTPUT = flags.DEFINE_string("output", None, "folder of results.json, results.md and times.png")
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is measured, where there is no git to ask")

_PROCESSES = flags.DEFINE_integer("processes", 1, "shapes that are compiled side by side", lower_bound=1)

_LONGEST_COMPILATION = 300.0  # seconds
_PACKAGES = ("jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "torch", "tilelang", *PACKAGES)


def _case(text: str) -> Case:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x([1-9]\d*)(?:x([1-9]\d*))?(?:([pk])([1-9]\d*))?", text)
    if match is None:
        raise app.UsageError(f"shape is {text!r}; it must be BxTxHxD or BxTxHxKxV, pN or kN behind for N documents")
    *numbers, kind, documents = match.groups()
    batch, length, heads, key_dim, value_dim = (int(size or 0) for size in numbers)
    sizes = (batch, length, heads, key_dim, value_dim or key_dim)
    return Case(*sizes, documents=int(documents or 1), known=kind == "k", dtype=_DTYPE.value)


def _plan() -> tuple[list[str], list[Case], list[str]]:
    """(implementations, cases, directions) of the flags."""
    directions = {"forward": FORWARD, "both": BOTH}
    for name in _DIRECTIONS.value:
        if name not in directions:
            raise app.UsageError(f"direction is {name!r}; it must be forward or both")
    try:
        for name in _IMPLEMENTATIONS.value:
            if name not in PEERS:
                split_name(name)
        cases = [_case(text) for text in _SHAPES.value]
    except UserError as error:
        raise app.UsageError(f"{error}; peers: {', '.join(PEERS)}") from error
    return _IMPLEMENTATIONS.value, cases, [directions[name] for name in _DIRECTIONS.value]


class _Job(NamedTuple):
    """What the process of a shape does."""

    case: Case
    names: list[str]
    directions: list[str]
    best: dict[str, float]
    repeats: int
    kernel_time: bool


def _builder(name: str):
    return peer if name in PEERS else implementation


@contextmanager
def _turn(path: str) -> Iterator[None]:
    """The device to oneself among processes that ask for it; one that dies gives it back."""
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _work(job: _Job, compiled: Any, lock: str, rows: Any) -> None:
    """Puts the rows of a shape into the queue `rows`: when all have passed the barrier `compiled`, in its turn."""
    bench = Bench(job.case, gradients=BOTH in job.directions)
    plan = [(direction, name) for direction in job.directions for name in job.names]
    built = {}
    for direction, name in plan:
        if name not in TIMES_ITSELF:
            with suppress(Exception):  # it fails again, and is reported, where it is measured
                built[direction, name] = _builder(name)(name, bench, direction)
    for rule in {name.partition(":")[2] or "exact" for name in job.names}:
        bench.exact(rule)
    with suppress(threading.BrokenBarrierError):  # a process that died: the others go on
        compiled.wait(_LONGEST_COMPILATION)
    with _turn(lock):
        for direction, name in plan:
            rows.put(_measure(job, bench, name, direction, built.pop((direction, name), None)))
            gc.collect()  # arrays that a peer still held


def _measure(job: _Job, bench: Bench, name: str, direction: str, built: Candidate | None) -> Row:
    """A row; a failure, of a peer or of a kernel, is one too, so that it does not cost the others."""
    build = _builder(name) if built is None else lambda *_: built
    options: dict[str, Any] = dict(repeats=job.repeats, kernel_time=job.kernel_time)
    try:
        return measure(bench, name, direction, job.best, build=build, **options)
    except ImportError as error:
        return declined(bench, name, direction, job.best, f"not installed: {error}")
    except Exception as error:
        traceback.print_exc()
        reason = f"failed, {type(error).__name__}: {str(error)[:300]}"
        return declined(bench, name, direction, job.best, reason)


def _all_rows(jobs: list[_Job], processes: int, lock: str) -> Iterator[Row]:
    """The rows of all shapes as they are measured; those of one come together.

    Raises:
        RuntimeError: at the end, where a process died.
    """
    context = multiprocessing.get_context("spawn")
    rows, died = context.Queue(), []
    for batch in itertools.batched(jobs, processes):
        compiled = context.Barrier(len(batch))
        arguments = [(job, compiled, lock, rows) for job in batch]
        running = [(args[0].case, context.Process(target=_work, args=args, daemon=True)) for args in arguments]
        for _, process in running:
            process.start()
        while running:
            try:
                yield rows.get(timeout=1)
            except queue.Empty:
                died += [str(case) for case, process in running if process.exitcode]
                running = [(case, process) for case, process in running if process.is_alive()]
    if died:
        raise RuntimeError(f"the processes of these shapes died: {', '.join(died)}")


def _versions() -> str:
    """Of what takes part and is installed, and of the driver."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if jax.default_backend() == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions += [f"driver {subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]}"]
    return ", ".join(versions)


def _facts() -> dict[str, Any]:
    flags_ = dict(
        implementations=_IMPLEMENTATIONS, shapes=_SHAPES, directions=_DIRECTIONS, repeats=_REPEATS, processes=_PROCESSES
    )
    text = lambda value: ",".join(value) if isinstance(value, list) else value
    options = [f"--{name}={text(flag.value)}" for name, flag in (flags_ | {"dtype": _DTYPE}).items()]
    facts: dict[str, Any] = dict(
        provenance(f"python -m experiments.kernels.benchmark {' '.join(options)}", _COMMIT.value)
    )
    facts["versions"] += f", {_versions()}"
    best = ceilings(_DTYPE.value)
    return facts | {"measured ceilings": ceilings_text(best), "ceilings": best}


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch allocates on the same device
    names, cases, directions = _plan()
    facts = _facts()
    header = "\n".join(f"- {key}: {value}" for key, value in facts.items() if key != "ceilings")
    print(header, flush=True)
    rows: list[Row] = []
    folder = Path(_OUTPUT.value) if _OUTPUT.value else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [_Job(case, names, directions, facts["ceilings"], _REPEATS.value, _KERNEL_TIME.value) for case in cases]
    with tempfile.TemporaryDirectory() as scratch:
        for row in _all_rows(jobs, _PROCESSES.value, f"{scratch}/lock"):
            if not rows or row["shape"] != rows[-1]["shape"]:
                print(f"\n{row['shape']}\n{HEADING}", flush=True)
            rows.append(row)
            print(line(row), flush=True)
            if folder:
                (folder / "results.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    if folder:
        (folder / "results.md").write_text(f"# Speed of the kernels\n\n{header}\n\n{table(rows)}\n")
        if any(not row["reason"] for row in rows):
            plot(rows, folder / "times.png")


if __name__ == "__main__":
    app.run(main)
