"""The state of a model behind a prompt: what a long prompt costs is paid once, also across processes."""

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from efla_jax.inference import InferenceError
from efla_jax.models import LanguageModelConfig
from efla_jax.training.sharding import leaf_name

_FORMAT = "efla_jax state 1"


class Fingerprints:
    """sha256 of a model (its config and parameters) and of its tokenizer. The model is hashed when first asked for."""

    def __init__(self, config: LanguageModelConfig, params: Any, tokenizer: str):
        self._config, self._params = config, params
        self.tokenizer = tokenizer

    @cached_property
    def model(self) -> str:
        config = json.dumps(dataclasses.asdict(self._config), sort_keys=True)
        return _digest(_named(self._params), config)

    def require(self, what: str, model: str | None, tokenizer: str | None) -> None:
        """Raises InferenceError unless these are the fingerprints; `what` has them."""
        for name, own, found in (("model", self.model, model), ("tokenizer", self.tokenizer, tokenizer)):
            if own != found:
                raise InferenceError(f"{what} is of another {name}: its {name} has sha256 {found}; it must be {own}")


@dataclass(frozen=True)
class State:
    """What a model holds of the tokens that it has read: one row of a cache, and the logits of what follows."""

    cache: tuple[jax.Array, ...]  # the leaves in their order, each [1, ...]
    logits: jax.Array  # float32 [1, vocab]
    tokens: np.ndarray  # int32 [N]
    fingerprints: Fingerprints

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `load_state` of the same model reads; it appears whole or not at all.

        Raises:
            InferenceError: it cannot be written.
        """
        path = Path(file).absolute()
        tensors = {f"cache/{number}": np.asarray(leaf) for number, leaf in enumerate(self.cache)}
        tensors |= dict(logits=np.asarray(self.logits), tokens=self.tokens)
        header = dict(
            format=_FORMAT,
            model=self.fingerprints.model,
            tokenizer=self.fingerprints.tokenizer,
            sha256=_digest(tensors),
        )
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
                save_file(tensors, Path(folder, path.name), metadata=header)
                os.replace(Path(folder, path.name), path)
        except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
            raise InferenceError(f"file is {str(file)!r}, which cannot be written: {error}") from error


def load_state(file: str | os.PathLike[str], fingerprints: Fingerprints) -> State:
    """Reads a state of the model with these fingerprints.

    Raises:
        InferenceError: the file is missing, no state, truncated or damaged, or of another model or tokenizer.
    """
    try:
        with safe_open(file, "numpy") as held:
            header = held.metadata() or {}
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InferenceError(f"{file} is no state, or a truncated one: {error}") from error
    if header.get("format") != _FORMAT:
        raise InferenceError(f"{file} has the format {header.get('format')!r}; it must be {_FORMAT!r}")
    if header.get("sha256") != _digest(tensors):
        raise InferenceError(f"{file} is damaged: its sha256 is not the one that was saved")
    fingerprints.require(str(file), header.get("model"), header.get("tokenizer"))
    cache = tuple(jnp.asarray(tensors[f"cache/{number}"]) for number in range(len(tensors) - 2))
    return State(cache, jnp.asarray(tensors["logits"]), tensors["tokens"], fingerprints)


def _named(tree: Any) -> dict[str, np.ndarray]:
    """Leaves on the host by name, such as "blocks/0/mixer/key/kernel"."""
    return {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(tensors: dict[str, np.ndarray], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype}{list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
    return digest.hexdigest()
