"""A model folder: what it takes to run a model, and nothing of its training.

DIR/config.json        format, version, the model's config, and the sha256 of its parameters
DIR/model.safetensors  the parameters by name, such as "blocks/0/mixer/key/kernel"
DIR/tokenizer/         see `efla_jax.data.text.tokenizers`
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from efla_jax.data.text import TextError
from efla_jax.data.text.tokenizers import Tokenizer, load_tokenizer
from efla_jax.inference import InferenceError
from efla_jax.models import LanguageModel, LanguageModelConfig
from efla_jax.training import manifest
from efla_jax.training.config import model_config, model_fields
from efla_jax.training.sharding import leaf_name

FORMAT, VERSION = "efla_jax", 1
PARAMETERS = "model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")  # that parameters may be stored in; computing casts them as it needs


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends, and vanishes if it ends in an error.

    Raises:
        InferenceError: `path` is there and is no empty folder, or it cannot be written.
    """
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InferenceError(f"output is {str(path)!r}, which is there already; it must be a new or an empty folder")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for entry in (*partial.rglob("*"), partial):
            manifest.sync(entry)
        os.rename(partial, target)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise InferenceError(f"output is {str(path)!r}, which cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes them in the order of their names, as PyTorch's libraries want the file marked."""
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    save_file(ordered, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library leaves it to its owner alone


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name.

    Raises:
        InferenceError: the file is missing, truncated or damaged.
    """
    if not file.is_file():
        raise InferenceError(f"{file} is missing")
    try:
        return load_file(file)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InferenceError(f"{file} is damaged or truncated: {error}") from error


def named_parameters(params: Any) -> dict[str, np.ndarray]:
    """The parameters by name, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {leaf_name(path): np.asarray(leaf) for path, leaf in leaves}


def parameter_shapes(config: LanguageModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of the model's parameters by name."""
    return {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(_form(config))}


def check_tensors(tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """Raises InferenceError, which names `file` and the tensor, unless the tensors have these names and shapes.

    Their types may be any of DTYPES.
    """
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors:
            raise InferenceError(f"{file} has no tensor {name!r}; the model needs it, of shape {list(shapes[name])}")
        if name not in shapes:
            raise InferenceError(f"{file} has a tensor {name!r}, which the model does not have")
        tensor, shape = tensors[name], shapes[name]
        if tensor.shape != shape:
            raise InferenceError(f"{file}: tensor {name!r} has shape {list(tensor.shape)}; it must be {list(shape)}")
        if tensor.dtype.name not in DTYPES:
            raise InferenceError(f"{file}: tensor {name!r} is {tensor.dtype}; it must be one of {', '.join(DTYPES)}")


def parameters(config: LanguageModelConfig, tensors: dict[str, np.ndarray]) -> nnx.State:
    """The model's parameters on the default device from tensors by name, in their dtypes."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(_form(config))
    return jax.tree.unflatten(structure, [jnp.asarray(tensors[leaf_name(path)]) for path, _ in leaves])


def _form(config: LanguageModelConfig) -> nnx.State:
    return nnx.eval_shape(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param))


def write_model(folder: Path, config: LanguageModelConfig, params: Any, tokenizer: Tokenizer) -> str:
    """Writes the files of a model folder into an empty one; returns the sha256 of the parameters' file."""
    write_tensors(folder / PARAMETERS, named_parameters(params))
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    digest = _sha256(folder / PARAMETERS)
    content = dict(format=FORMAT, version=VERSION, model=model_fields(config), sha256={PARAMETERS: digest})
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return digest


def save_folder(path: str | os.PathLike[str], config: LanguageModelConfig, params: Any, tokenizer: Tokenizer) -> None:
    """Writes a model folder; nothing is at `path` until all of it is.

    Raises:
        InferenceError: as `new_folder`.
    """
    with new_folder(path) as folder:
        write_model(folder, config, params, tokenizer)


def load_folder(path: str | os.PathLike[str]) -> tuple[LanguageModelConfig, nnx.State, Tokenizer]:
    """Returns what `save_folder` was given, the parameters on the default device.

    Raises:
        InferenceError: `path` is no model folder, or one of its files is missing, damaged or of another model.
    """
    config, tensors, tokenizer, digest = read_model(Path(path))
    check_tensors(tensors, parameter_shapes(config), Path(path) / PARAMETERS)
    check_digest(Path(path), digest)  # last, so that what is wrong is said more exactly where it can be
    return config, parameters(config, tensors), tokenizer


def read_model(path: Path) -> tuple[LanguageModelConfig, dict[str, np.ndarray], Tokenizer, str]:
    """(config, parameters by name, tokenizer, the sha256 that the parameters' file must have) of a model folder."""
    config, digest = _read_config(path)
    tensors = read_tensors(path / PARAMETERS)
    try:
        return config, tensors, load_tokenizer(path / "tokenizer"), digest
    except TextError as error:
        raise InferenceError(f"{path / 'tokenizer'} is missing or damaged: {error}") from error


def check_digest(path: Path, digest: str) -> None:
    """Raises InferenceError unless the parameters' file in `path` has this sha256."""
    if _sha256(path / PARAMETERS) != digest:
        raise InferenceError(f"{path / PARAMETERS} is damaged: its sha256 is not the one in config.json")


def read_object(file: Path, otherwise: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InferenceError, which says what the folder is where the file is missing."""
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise InferenceError(f"{file.parent} {otherwise}: {error}") from error
    except ValueError as error:
        raise InferenceError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise InferenceError(f"{file} is damaged: it must hold an object")
    return content


def _read_config(path: Path) -> tuple[LanguageModelConfig, str]:
    file = path / "config.json"
    content = read_object(file, "is no model folder")
    found, version = content.get("format"), content.get("version")
    if found != FORMAT or version != VERSION:
        raise InferenceError(f"{file} is of format {found!r}, version {version!r}; it must be {FORMAT!r}, {VERSION}")
    try:
        model, digest = model_config(content["model"]), content["sha256"][PARAMETERS]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InferenceError(f"{file} is damaged: {error!r}") from error
    if not isinstance(model, LanguageModelConfig):
        raise InferenceError(f"{file} is of a {type(model).__name__}; it must be of a language model")
    return model, digest


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
