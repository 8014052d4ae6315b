"""Checkpoints in fla's layout with random parameters, written without our code."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy its bfloat16)
import numpy as np
from safetensors.numpy import save_file

_BASE = dict(
    hidden_size=16, num_hidden_layers=2, vocab_size=40, hidden_ratio=4, intermediate_size=24,
    max_position_embeddings=64, tie_word_embeddings=False, use_short_conv=True, conv_size=4, attn=None,
    hidden_act="swish", norm_eps=1e-6, allow_neg_eigval=False, dtype="float32", num_heads=2, fuse_norm=True,
    bos_token_id=1, eos_token_id=2, transformers_version="5.24.0", attn_mode="chunk",
)  # fmt: skip
DELTA_NET = _BASE | dict(
    model_type="delta_net", architectures=["DeltaNetForCausalLM"], expand_k=0.5, expand_v=1.5, use_gate=False,
    use_beta=True, qk_norm="l2", qk_activation="silu",
)  # fmt: skip
GATED = _BASE | dict(
    model_type="gated_deltanet", architectures=["GatedDeltaNetForCausalLM"], head_dim=6, expand_v=8 / 6,
    num_v_heads=4, use_gate=True, output_gate_activation="swish",
)  # fmt: skip
_ATTENTION = dict(num_heads=4, num_kv_heads=2, qkv_bias=False, rope_theta=500.0)
CASES: dict[str, dict[str, Any]] = {
    "delta_net": DELTA_NET,
    "gated_deltanet": GATED,
    "delta_net, gate, tied, no convolution": DELTA_NET
    | dict(use_gate=True, tie_word_embeddings=True, use_short_conv=False, intermediate_size=None, num_hidden_layers=1),
    "gated_deltanet, no gate, hybrid": GATED
    | dict(
        use_gate=False, num_v_heads=None, num_hidden_layers=4,
        attn=[_ATTENTION | dict(layers=[3], window_size=None), _ATTENTION | dict(layers=[1], window_size=5)],
    ),
}  # fmt: skip


def shapes(content: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of fla's model of this config."""
    width, heads = content["hidden_size"], content["num_heads"]
    gated = content["model_type"] == "gated_deltanet"
    value_heads = (content["num_v_heads"] or heads) if gated else heads
    key_width = heads * content["head_dim"] if gated else round(width * content["expand_k"])
    value_dim = int(content["head_dim"] * content["expand_v"]) if gated else round(width * content["expand_v"]) // heads
    value_width = value_heads * value_dim
    hidden = content["intermediate_size"] or 256 * -(-int(width * content["hidden_ratio"] * 2 / 3) // 256)
    specs = [content["attn"]] if isinstance(content["attn"], dict) else content["attn"] or []
    found: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (content["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not content["tie_word_embeddings"]:
        found["lm_head.weight"] = (content["vocab_size"], width)
    for layer in range(content["num_hidden_layers"]):
        spec = next((spec for spec in specs if layer in spec["layers"]), None)
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (width,),
            "mlp_norm.weight": (width,),
            "mlp.down_proj.weight": (width, hidden),
        }
        block |= {f"mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        if spec:
            narrow = width // spec["num_heads"] * spec["num_kv_heads"]
            sizes = dict(q=width, k=narrow, v=narrow, o=width)
            block |= {f"attn.{name}_proj.weight": (size, width) for name, size in sizes.items()}
        else:
            sizes = dict(q=key_width, k=key_width, v=value_width)
            block |= {f"attn.{name}_proj.weight": (size, width) for name, size in sizes.items()}
            block |= {"attn.b_proj.weight": (value_heads, width), "attn.o_proj.weight": (width, value_width)}
            block |= {"attn.o_norm.weight": (value_dim,)}
            if content["use_short_conv"]:
                block |= {f"attn.{n}_conv1d.weight": (size, 1, content["conv_size"]) for n, size in sizes.items()}
            if content["use_gate"]:
                block["attn.g_proj.weight"] = (value_width, width)
            if gated:
                block |= {"attn.A_log": (value_heads,), "attn.dt_bias": (value_heads,)}
                block["attn.a_proj.weight"] = (value_heads, width)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found


def draw(content: dict[str, Any], dtypes=("float32",), seed=0) -> dict[str, np.ndarray]:
    """Random tensors of such sizes that every one of them matters; their types take turns."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for number, (name, shape) in enumerate(sorted(shapes(content).items())):
        scale = 1.0 if len(shape) < 2 or "conv1d" in name or "embeddings" in name else shape[-1] ** -0.5
        tensor = scale * rng.normal(size=shape) + ("norm" in name)
        tensors[name] = tensor.astype(np.dtype(dtypes[number % len(dtypes)]))
    return tensors


def write(folder: Path, content: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Writes a checkpoint as Hugging Face's library does, with an index where it has several files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
