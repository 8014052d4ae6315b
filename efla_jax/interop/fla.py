"""Checkpoints of `fla` (flash-linear-attention): its DeltaNet and Gated DeltaNet language models.

DIR/config.json                    of Hugging Face's form, "model_type" delta_net or gated_deltanet
DIR/model.safetensors              the parameters, or several files and model.safetensors.index.json
DIR/tokenizer.json or .model       the tokenizer, if there is one

The layout is that of fla 0.6. Parameters keep their values and dtypes both ways, bit for bit.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from efla_jax.data.text.tokenizers import Tokenizer, load_tokenizer
from efla_jax.inference import InferenceError
from efla_jax.inference.folder import (
    PARAMETERS,
    check_tensors,
    named_parameters,
    new_folder,
    parameter_shapes,
    parameters,
    read_object,
    read_tensors,
    write_tensors,
)
from efla_jax.interop.fla_config import from_fla, to_fla
from efla_jax.models import LanguageModelConfig

_BETA_BIAS = "/mixer/beta/bias"  # fla has none

# Our name -> fla's, of the whole model and of a block.
_MODEL = {
    "embed/embedding": "model.embeddings.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_BLOCK = {
    "mixer_norm/scale": "attn_norm.weight",
    "mixer/query/kernel": "attn.q_proj.weight",
    "mixer/key/kernel": "attn.k_proj.weight",
    "mixer/value/kernel": "attn.v_proj.weight",
    "mixer/out/kernel": "attn.o_proj.weight",
    "mixer/beta/kernel": "attn.b_proj.weight",
    "mixer/convolutions/0/kernel": "attn.q_conv1d.weight",
    "mixer/convolutions/1/kernel": "attn.k_conv1d.weight",
    "mixer/convolutions/2/kernel": "attn.v_conv1d.weight",
    "mixer/norm/scale": "attn.o_norm.weight",
    "mixer/gate/kernel": "attn.g_proj.weight",
    "mixer/decay/kernel": "attn.a_proj.weight",
    "mixer/decay_rate": "attn.A_log",
    "mixer/decay_bias": "attn.dt_bias",
    "mlp_norm/scale": "mlp_norm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}


def load(path: str | os.PathLike[str]) -> tuple[LanguageModelConfig, nnx.State, Tokenizer | None]:
    """(config, parameters on the default device, tokenizer or None where there is none) of fla's checkpoint.

    Raises:
        InferenceError: `path` is no such checkpoint, it has an option that our model has not (which is named), or a
            tensor is missing, is not one of the model's, or has another shape. TextError: of the tokenizer.
    """
    root = Path(path)
    config = from_fla(read_object(root / "config.json", "is no checkpoint of fla"), root / "config.json")
    tensors, file = _read_checkpoint(root)
    head, embedding = (tensors.get(_MODEL[name]) for name in ("head/kernel", "embed/embedding"))
    if config.tied and head is not None and embedding is not None and np.array_equal(head, embedding):
        del tensors[_MODEL["head/kernel"]]  # a second name of the embedding
    shapes = parameter_shapes(config)
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    check_tensors(tensors, {_fla_name(name): _to_fla(name, tensor).shape for name, tensor in empty.items()}, file)
    params = parameters(config, {name: _from_fla(name, tensors[_fla_name(name)]) for name in shapes})
    files = [root / name for name in ("tokenizer.json", "tokenizer.model") if (root / name).is_file()]
    return config, params, load_tokenizer(files[0]) if files else None


def save(path: str | os.PathLike[str], config: LanguageModelConfig, params: Any, tokenizer: Tokenizer | None) -> None:
    """Writes a checkpoint that fla loads; nothing is at `path` until all of it is.

    Raises:
        InferenceError: fla has no such model, with every reason; or as `new_folder`.
    """
    content = to_fla(config)
    tensors = named_parameters(params)
    for name in [name for name in tensors if name.endswith(_BETA_BIAS)]:
        if np.any(tensors.pop(name)):
            raise InferenceError(f"fla has no such model: parameter {name!r} is not 0, and its beta has no bias")
    if tokenizer is not None:  # ours begins and ends a document with one id
        content |= dict(bos_token_id=tokenizer.separator, eos_token_id=tokenizer.separator)
    with new_folder(path) as folder:
        write_tensors(folder / PARAMETERS, {_fla_name(name): _to_fla(name, tensors[name]) for name in tensors})
        (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save(folder)


def _fla_name(name: str) -> str:
    """fla's name of our parameter."""
    if name in _MODEL:
        return _MODEL[name]
    _, number, rest = name.split("/", 2)
    return f"model.layers.{number}.{_BLOCK[rest]}"


def _to_fla(name: str, tensor: np.ndarray) -> np.ndarray:
    """Our parameter in fla's form: matrices [out, in]; convolutions [D, 1, W], the last entry being lag 0."""
    if "/convolutions/" in name:
        return tensor[::-1].T[:, None]
    return tensor.T if name.endswith("/kernel") else tensor


def _from_fla(name: str, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `_to_fla`."""
    if "/convolutions/" in name:
        return tensor[:, 0].T[::-1]
    return tensor.T if name.endswith("/kernel") else tensor


def _read_checkpoint(root: Path) -> tuple[dict[str, np.ndarray], Path]:
    """(tensors, the file that says which they are): of one file, or of several with an index."""
    index = root / f"{PARAMETERS}.index.json"
    if not index.is_file():
        return read_tensors(root / PARAMETERS), root / PARAMETERS
    places = read_object(index, "is no checkpoint of fla").get("weight_map")
    if not isinstance(places, dict):
        raise InferenceError(f"{index} is damaged: it has no weight_map")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        held = read_tensors(root / name)
        listed = {tensor for tensor, place in places.items() if place == name}
        if listed != held.keys():
            odd = sorted(listed ^ held.keys())[0]
            raise InferenceError(f"{root / name} and {index.name} differ: tensor {odd!r} is in only one of them")
        tensors |= held
    return tensors, index
