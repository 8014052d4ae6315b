"""Training from a config in a workdir: start or resume, step, log, save, stop cleanly.

WORKDIR/config.json      the config of the run
WORKDIR/metrics.jsonl    a JSON object per logged step
WORKDIR/tensorboard/     the same for TensorBoard
WORKDIR/checkpoints/     see `checkpoint.py`
WORKDIR/tokenizer/       of a language model
"""

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from efla_jax.data.pipeline import batches
from efla_jax.data.text.tokenizers import Tokenizer, load_tokenizer
from efla_jax.errors import UserError
from efla_jax.models import build, graph_of
from efla_jax.training.checkpoint import CheckpointError, Checkpoints, load_newest
from efla_jax.training.config import Config, ConfigError, differences, from_json, to_json
from efla_jax.training.distributed import (
    Interrupt,
    barrier,
    batch_share,
    check_agreement,
    check_shared,
    name_lost_processes,
)
from efla_jax.training.metrics import MetricsWriter
from efla_jax.training.objectives import objective_of
from efla_jax.training.records import open_records
from efla_jax.training.sharding import BATCH, TOKENS, make_mesh, state_shardings
from efla_jax.training.step import (
    State,
    initial_state,
    make_optimizer,
    make_train_step,
    parameter_names,
    schedule,
)

logger = logging.getLogger(__name__)

# Fields in which a run may differ from the one its workdir holds: what it computes stays the same.
_FREE_FIELDS = (
    "train.log_every", "train.checkpoint_every", "train.keep", "mesh.",
    "data.data_dir", "data.cache_dir", "data.validation",
)  # fmt: skip


class NonFiniteError(UserError, ArithmeticError):
    """The loss or a gradient is not finite; the message names the step and the culprit."""


@dataclass(frozen=True)
class Program:
    """The jitted functions of a run and the form of its state (ShapeDtypeStructs with shardings)."""

    mesh: Mesh
    graph: nnx.GraphDef
    form: State
    start: Any  # () -> state
    step: Any  # (state, batch) -> (state, metrics); donates the state
    parameter_names: list[str]


def make_program(config: Config, mesh: Mesh) -> Program:
    """Call, and use, inside `jax.set_mesh(mesh)`."""
    graph = graph_of(config.model)
    learning_rate = schedule(config.optimizer, config.train.steps)
    optimizer: optax.GradientTransformation = make_optimizer(config.optimizer, learning_rate)
    start = lambda: initial_state(config, jax.random.key(config.train.seed), optimizer)
    form = jax.eval_shape(start)
    shardings = state_shardings(mesh, form)
    objective = objective_of(config)
    step = make_train_step(graph, optimizer, learning_rate, TOKENS, objective=objective, parts=config.train.parts)
    return Program(
        mesh=mesh,
        graph=graph,
        form=jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), form, shardings),
        start=jax.jit(start, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        parameter_names=parameter_names(form["params"]),
    )


def open_workdir(workdir: str | os.PathLike[str], config: Config) -> Path:
    """Makes the workdir for this config, or checks that it holds a run of it. Process 0 writes, all of them check.

    Raises:
        ConfigError: it cannot be written, is not shared by all processes, its config.json is damaged, or it holds a
            run of another config; the differing fields are named.
    """
    path = Path(workdir)
    file = path / "config.json"
    try:
        if jax.process_index() == 0:
            path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0 and not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(to_json(config))
            partial.replace(file)
        check_shared(path)
    except OSError as error:
        raise ConfigError(f"--workdir is {str(workdir)!r}, which cannot be written: {error}") from error
    # a constant learning rate does not know where the run ends, so the run may be made longer
    free = (*_FREE_FIELDS, "train.steps") if config.optimizer.schedule == "constant" else _FREE_FIELDS
    found = differences(config, _config_of(workdir), free)
    if found:
        raise ConfigError(
            f"--workdir is {str(workdir)!r}, which holds a run of another config: {'; '.join(found)}. "
            "Use another workdir, or the config of the run"
        )
    return path


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Saves the tokenizer beside the run, or checks that the run was begun with this one. Raises ConfigError."""
    folder = workdir / "tokenizer"
    if jax.process_index() == 0 and not folder.exists():
        partial = workdir / "tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tokenizer.save(partial)
        partial.rename(folder)
    barrier("tokenizer saved")
    if load_tokenizer(str(folder)).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"config.data.tokenizer is {tokenizer.name!r}, which is not the one that {str(workdir)!r} was begun with"
        )


def _config_of(workdir: str | os.PathLike[str]) -> Config:
    """The config of the run that a workdir holds. Raises ConfigError."""
    file = Path(workdir) / "config.json"
    try:
        return from_json(file.read_text())
    except OSError as error:
        raise ConfigError(f"--workdir is {str(workdir)!r}, which holds no run: {error}") from error
    except ValueError as error:  # from_json's own, or bytes that are no text
        raise ConfigError(f"{file} is damaged: {error}. Put the run's config back, or use another workdir") from error


@dataclass
class Report:
    """Checks and writes the metrics of steps, in order."""

    writer: MetricsWriter
    config: Config
    names: list[str]
    last_step: int
    last_time: float

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Waits for the step. Raises NonFiniteError."""
        values: dict[str, Any] = {name: np.asarray(value) for name, value in metrics.items()}
        norms = values.pop("leaf_norms")
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            bad = [name for name, norm in zip(self.names, norms, strict=True) if not math.isfinite(norm)]
            raise NonFiniteError(
                f"step {step}: the loss is {values['loss']}, the gradient not finite in "
                f"{', '.join(bad) or 'no parameter'}; nothing of this step was saved"
            )
        if step % self.config.train.log_every == 0 or step == 1:  # step 1 shows the model as initialised
            now = time.monotonic()
            tokens = self.config.train.batch_size * self.config.record_tokens * (step - self.last_step)
            values["tokens_per_second"] = tokens / max(now - self.last_time, 1e-9)
            self.last_step, self.last_time = step, now
            self.writer.write(step, values)


def check_fit(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError unless the mesh divides the batch and the heads."""
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.train.parts
    if config.train.batch_size % (shards * parts):
        in_parts = f" times config.train.parts = {parts}" if parts > 1 else ""
        raise ConfigError(
            f"config.train.batch_size is {config.train.batch_size}; it must be a multiple of {shards}, "
            f"the devices along the mesh's data and fsdp{in_parts}"
        )
    if config.model.key_heads % mesh.shape["tensor"]:
        raise ConfigError(
            f"config.mesh.tensor is {mesh.shape['tensor']}; it must divide the model's key heads, "
            f"{config.model.key_heads}"
        )


def train(config: Config, workdir: str | os.PathLike[str]) -> int:
    """Trains from the newest good checkpoint in the workdir, or from scratch; returns the step it ended at.

    Ends early, after saving, on SIGTERM. The same call goes on from there, bit for bit.

    Raises:
        ConfigError: the workdir does not fit, see `open_workdir`, or the mesh the devices and the batch, or the
            processes have different configs.
        NonFiniteError: with the last good checkpoint untouched.
        LostProcessError: another process has ended.
    """
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    process_index, process_count = batch_share(NamedSharding(mesh, BATCH), config.train.batch_size)
    check_agreement("the config", to_json(config))
    path = open_workdir(workdir, config)
    records = open_records(config)
    check_agreement("the training text", records.digest)
    if records.tokenizer is not None:
        keep_tokenizer(path, records.tokenizer)
    data = batches(
        records.source,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        process_index=process_index,
        process_count=process_count,
    )
    with (
        jax.set_mesh(mesh),
        Interrupt() as interrupt,  # the outer one: a second SIGTERM must not cut off the last save
        Checkpoints(path / "checkpoints", keep=config.train.keep) as checkpoints,
        name_lost_processes(),
    ):
        program = make_program(config, mesh)
        restored = checkpoints.restore(program.form, data)
        state, first = restored or (program.start(), 0)
        if restored:
            logger.info("resuming %s at step %d", workdir, first)
        with MetricsWriter(path, total_steps=config.train.steps, resume_step=first) as writer:
            report = Report(writer, config, program.parameter_names, first, time.monotonic())
            last = run_steps(config, program, state, data, first, checkpoints, report, interrupt)
    barrier("end of training")  # the last checkpoint is published, for every process
    return last


@dataclass(frozen=True)
class Run:
    """A trained model: its config, static part, parameters and step."""

    config: Config
    graph: nnx.GraphDef
    params: Any
    step: int


def load_run(workdir: str | os.PathLike[str]) -> Run:
    """The newest good checkpoint of a workdir, its parameters on the default device.

    Raises:
        ConfigError: there is no run in the workdir, or its config.json is damaged.
        CheckpointError: it has no good checkpoint; CheckpointMismatchError: the checkpoint is of another model.
    """
    path = Path(workdir)
    config = _config_of(workdir)
    form = jax.eval_shape(lambda: nnx.state(build(config.model, rngs=nnx.Rngs(0)), nnx.Param))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    form = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), form)
    loaded = load_newest(path / "checkpoints", {"params": form})
    if loaded is None:
        raise CheckpointError(f"{path / 'checkpoints'} holds no checkpoint")
    state, step = loaded
    return Run(config, graph_of(config.model), state["params"], step)


def run_steps(
    config: Config,
    program: Program,
    state: State,
    data: Any,
    first: int,
    checkpoints: Checkpoints,
    report: Report,
    interrupt: Interrupt,
) -> int:
    """Steps first + 1 … config.train.steps. DO NOT CHANGE THE ORDER of report, save and the next batch."""
    place = NamedSharding(program.mesh, BATCH)
    pending = None  # (step, metrics) dispatched and not read yet
    step = first
    while step < config.train.steps and not interrupt.requested(step):
        batch = jax.make_array_from_process_local_data(place, next(data))
        state, metrics = program.step(state, batch)
        step += 1
        # the devices work on this step while the host reads and writes the one before
        if pending:
            report(*pending)
        pending = (step, metrics)
        if step % config.train.checkpoint_every == 0:
            # a step is checked, and its metrics are on disk, before its checkpoint exists
            report(*pending)
            pending = None
            checkpoints.save(step, state, data)
    if pending:
        report(*pending)
    if step > first and checkpoints.latest != step:
        checkpoints.save(step, state, data)
    return step
