"""Checkpoints of a training run: saved in the background, verified, resumed bit for bit.

    DIR/<step>/           a finished checkpoint: orbax's files and their manifest
    DIR/saving-<step>*    a save that is under way, or was killed; nobody reads it
    DIR/corrupt-<step>/   a damaged checkpoint, set aside by a run that resumed from an older one

A checkpoint gets its number by one rename, after orbax has committed its files and the manifest is
on the disk. So a kill at any moment leaves whole checkpoints and `saving-` debris, and whatever is
wrong with a numbered directory happened to it later. orbax itself notices neither a flipped bit nor
a differing dtype, and reports damage and another model's checkpoint alike: hence the manifest.

DIR must be on a file system with atomic renames, and belong to one run at a time.
"""

import logging
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from efla_jax.errors import UserError
from efla_jax.training import manifest

# Top-level name -> pytree of jax.Array, or of jax.ShapeDtypeStruct where only the form is needed.
State = dict[str, Any]

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """Checkpoints cannot be written or read; the message names the directory and the reason."""


class CheckpointMismatchError(CheckpointError):
    """An undamaged checkpoint whose leaves are not those of the state that was asked for."""


def load_newest(directory: str | os.PathLike[str], state: State) -> tuple[State, int] | None:
    """Returns the newest good checkpoint and its step, as `Checkpoints.restore` does, but writes
    nothing, needs no data iterator, and `state` may be some of the saved parts, such as "params"
    and "rest".
    """
    root = Path(directory).absolute()
    step, _ = _newest_good(root, state, whole=False)
    return None if step is None else (_load(root / str(step), {"state": state}), step)


class Checkpoints:
    """The checkpoints below one directory; a context manager that waits for the last save.

    `keep` is how many good checkpoints stay, the newest ones; None keeps all.
    `latest` is the step saved or restored last, None before that.
    With several processes, all of them call every method; process 0 publishes and deletes.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; must be at least 1, or None to keep all checkpoints")
        self.latest: int | None = None
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._verified: set[int] = set()  # steps whose files this object has hashed
        self._pending: Future[None] | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._directory).close()
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {directory}: {error}") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")

    def restore(self, state: State, data: Any) -> tuple[State, int] | None:
        """Returns the newest good checkpoint and its step, or None if there is no checkpoint.

        The leaves of `state` (arrays, or ShapeDtypeStructs with shardings) must have the
        checkpoint's names, shapes and dtypes; their shardings are those of what is returned.
        `data`, a grain iterator, is set in place. Damaged checkpoints that are newer are named in
        warnings and set aside. Raises CheckpointMismatchError where leaves differ, CheckpointError
        where every checkpoint is damaged or an undamaged one does not load.
        """
        self.wait()
        self.latest, damaged = _newest_good(self._directory, state, whole=True)
        restored = None
        if self.latest is not None:
            path = self._directory / str(self.latest)
            restored = _load(path, {"state": state, "data": data}), self.latest
            self._verified.add(self.latest)
        if jax.process_count() > 1:  # nobody may still be reading what is moved now
            multihost_utils.sync_global_devices("checkpoint restored")
        if jax.process_index() == 0:
            for step in damaged:
                self._set_aside(step)
            for debris in self._directory.glob("saving-*"):
                logger.warning("checkpoint %s skipped and deleted: its save was cut off", debris)
                shutil.rmtree(debris)
        return restored

    def save(self, step: int, state: State, data: Any) -> None:
        """Saves in the background, after the save before it; raises if that one failed.

        On return `state` has been read: its buffers may be donated, and `data` may move on.
        """
        self.wait()
        newest = max(_steps(self._directory), default=-1)
        if step <= newest:
            raise CheckpointError(
                f"cannot save step {step} to {self._directory}: step {newest} is there; "
                "restore it first, or use another directory"
            )
        for name, leaf in _named_leaves(state).items():
            # orbax writes what it was given a view of. The content of a jax.Array cannot change,
            # not even by donation: the runtime copies a buffer instead while a view of it exists.
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"state leaf {name} is a {type(leaf).__name__}; must be jax.Array")
        saving = self._directory / f"saving-{step}"
        response = ocp.save_checkpointables_async(os.fspath(saving), {"state": state, "data": data}, overwrite=True)
        self._pending = self._thread.submit(self._finish, step, response, saving, _describe(state))
        self.latest = step

    def wait(self) -> None:
        """Returns when the save under way is published; raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does; nothing can be saved after that."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError:  # is in the log; must not hide the error that ended the block
            if error is None:
                raise

    def _finish(self, step: int, response: ocp.AsyncResponse[None], saving: Path, leaves: dict[str, str]) -> None:
        """In the background thread: waits for orbax, publishes, deletes what is too old."""
        try:
            response.result()
            if jax.process_index() == 0:
                manifest.write(saving, {"step": step, "leaves": leaves})
                os.rename(saving, self._directory / str(step))
                manifest.sync(self._directory)
                self._verified.add(step)
                self._prune()
        except Exception as error:
            message = f"saving checkpoint {step} to {self._directory} failed: {error}"
            logger.error(message)  # now, since the call that raises it may come much later
            for debris in (saving, *self._directory.glob(f"{saving.name}.*")):
                shutil.rmtree(debris, ignore_errors=True)
            raise CheckpointError(message) from error

    def _prune(self) -> None:
        """Deletes what is older than the newest `keep` good ones, of which one was just saved."""
        if self._keep is None:
            return
        good = 0
        for step in reversed(_steps(self._directory)):
            path = self._directory / str(step)
            if good == self._keep:
                shutil.rmtree(path)
                continue
            try:
                if step not in self._verified:  # of an earlier run; hashed once in this one
                    manifest.verify(path, manifest.read(path))
            except manifest.DamagedError as reason:
                logger.warning("checkpoint %s is damaged: %s", path, reason)
                self._set_aside(step)
            else:
                self._verified.add(step)
                good += 1

    def _set_aside(self, step: int) -> None:
        """Frees the number of a damaged checkpoint, so that its step can be saved again."""
        target = self._directory / f"corrupt-{step}"
        if target.exists():
            shutil.rmtree(target)
        os.rename(self._directory / str(step), target)
        logger.warning("damaged checkpoint %d moved to %s", step, target)


def _steps(directory: Path) -> list[int]:
    """The steps of the numbered directories, ascending."""
    names = [path.name for path in directory.glob("[0-9]*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _newest_good(directory: Path, state: State, *, whole: bool) -> tuple[int | None, list[int]]:
    """Returns the newest good step, None if there is no step, and the damaged ones above it.

    `whole`: the checkpoint may have no more parts than `state`.
    """
    damaged: dict[int, str] = {}
    for step in reversed(_steps(directory)):
        path = directory / str(step)
        try:
            content = manifest.read(path)
            _require_same_leaves(path, content["leaves"], state, whole=whole)
            manifest.verify(path, content)
        except manifest.DamagedError as reason:
            logger.warning("checkpoint %s skipped: %s", path, reason)
            damaged[step] = f"{path}: {reason}"
        else:
            return step, list(damaged)
    if damaged:
        reasons = "\n  ".join(damaged.values())
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged; move them away to start from scratch:\n  {reasons}"
        )
    return None, []


def _require_same_leaves(path: Path, held: dict[str, str], state: State, *, whole: bool) -> None:
    needed = _describe(state)
    if not whole:
        held = {name: leaf for name, leaf in held.items() if name.split("/")[0] in state}
    differing = [
        f"{name}: the checkpoint holds {held.get(name, 'nothing')}, the model needs {needed.get(name, 'nothing')}"
        for name in sorted(held.keys() | needed.keys())
        if held.get(name) != needed.get(name)
    ]
    if differing:
        raise CheckpointMismatchError(
            f"{path} is a checkpoint of another model; leaves that differ: {len(differing)}\n  "
            + "\n  ".join(differing)
        )


def _named_leaves(state: State) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(state: State) -> dict[str, str]:
    """Name of each leaf -> its dtype and shape, such as "bfloat16[3, 4]" or "key<fry>[]"."""
    leaves = _named_leaves(state)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _load(path: Path, wanted: dict[str, Any]) -> State:
    """Loads "state", and "data" in place if it is wanted, from a verified checkpoint."""
    for name, leaf in _named_leaves(wanted["state"]).items():
        if leaf.sharding is None:
            raise ValueError(f"state leaf {name} has no sharding; needs the one to restore it to")
    form = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        wanted["state"],
    )
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # the leaves were compared before
    try:
        with context:
            return ocp.load_checkpointables(os.fspath(path), wanted | {"state": form})["state"]
    except Exception as error:  # orbax wraps whatever it was into one kind of error
        reason = error.__cause__ or error
        raise CheckpointError(f"{path} is undamaged but does not load: {reason}") from error
