"""Loading a model from whatever folder holds one."""

import os
from pathlib import Path
from typing import Any

from efla_jax.data.text.tokenizers import Tokenizer, load_tokenizer
from efla_jax.inference import InferenceError
from efla_jax.inference.folder import load_folder, read_object
from efla_jax.inference.text import TextModel
from efla_jax.models import LanguageModelConfig


def load(path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> TextModel:
    """The language model in a workdir (its newest good checkpoint), an exported folder, or a folder of `fla`.

    tokenizer: as in `load_tokenizer`, in place of the one that lies beside the model.

    Raises:
        ValueError: the folder holds no language model, or one that does not fit its tokenizer; or the errors of
            `load_run`, `load_folder` and `interop.fla.load`, which name the file and what is wrong with it.
    """
    return TextModel(*load_parts(path, tokenizer))


def load_parts(
    path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> tuple[LanguageModelConfig, Any, Tokenizer]:
    """(config, params, tokenizer) of `load`."""
    folder = Path(path)
    content = read_object(folder / "config.json", "holds no model")
    if "model_type" in content:
        from efla_jax.interop import fla

        config, params, found = fla.load(folder)
    elif "format" in content:
        config, params, found = load_folder(folder)
    else:
        config, params, found = _load_workdir(folder, tokenizer)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
    if found is None:
        raise InferenceError(f"{path} has no tokenizer; name one, as in load({str(path)!r}, tokenizer=…)")
    return config, params, found


def _load_workdir(folder: Path, tokenizer: str | os.PathLike[str] | None) -> tuple[LanguageModelConfig, Any, Any]:
    from efla_jax.training.loop import load_run

    run = load_run(folder)
    if not isinstance(run.config.model, LanguageModelConfig):
        raise InferenceError(f"{folder} holds a {type(run.config.model).__name__}; it must be a language model")
    return run.config.model, run.params, load_tokenizer(folder / "tokenizer") if tokenizer is None else None
