"""The options of fla's DeltaNet and Gated DeltaNet, and ours: `from_fla` and `to_fla`.

Whatever one side cannot express is refused by name. fla's options that say how a model is run or trained, and change
nothing of what it computes, are passed over.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efla_jax.inference import InferenceError
from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModelConfig

logger = logging.getLogger(__name__)

KINDS = {"delta_net": "deltanet", "gated_deltanet": "gated_deltanet"}  # model_type -> our mixer
_CLASSES = {"delta_net": "DeltaNetForCausalLM", "gated_deltanet": "GatedDeltaNetForCausalLM"}

# fla's options and their defaults, of both models and of each.
_COMMON: dict[str, Any] = dict(
    hidden_size=2048, num_hidden_layers=24, vocab_size=32000, hidden_ratio=None, intermediate_size=None,
    max_position_embeddings=2048, tie_word_embeddings=False, use_short_conv=True, conv_size=4, attn=None,
)  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "delta_net": _COMMON | dict(num_heads=16, expand_k=1.0, expand_v=1.0, use_gate=False),
    "gated_deltanet": _COMMON
    | dict(num_hidden_layers=21, num_heads=6, num_v_heads=None, head_dim=256, expand_v=2.0, use_gate=True),
}
# Options of which our model has one value alone, the first.
_FIXED: dict[str, tuple[Any, ...]] = dict(
    hidden_act=("swish",), norm_eps=(1e-6,), allow_neg_eigval=(False,), conv_bias=(False,), attnres_block_size=(None,)
)
_FIXED_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "delta_net": _FIXED | dict(use_beta=(True,), qk_norm=("l2",), qk_activation=("silu",)),
    "gated_deltanet": _FIXED | dict(output_gate_activation=("swish", "silu")),
}
# What may stand in config.json and changes nothing here; of Hugging Face's library only what it always writes.
_IGNORED = {
    "architectures", "attn_mode", "auto_map", "bos_token_id", "dtype", "eos_token_id", "fuse_cross_entropy",
    "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "initializer_range", "model_type", "pad_token_id",
    "torch_dtype", "transformers_version", "use_cache", "use_l2warp", "use_output_norm",
}  # fmt: skip


def from_fla(content: dict[str, Any], file: Path) -> LanguageModelConfig:
    """Our config of fla's config.json; `file` is what errors name.

    Raises:
        InferenceError: another model_type, an option that our model has not, or sizes that do not fit.
    """
    kind = content.get("model_type")
    if kind not in KINDS:
        raise InferenceError(f"{file}: model_type is {kind!r}; it must be {' or '.join(KINDS)}")
    for name, values in _FIXED_OF[kind].items():
        if content.get(name, values[0]) not in values:
            raise InferenceError(f"{file}: {name} is {content[name]!r}; this library has {values[0]!r} alone")
    options = _OPTIONS[kind] | {name: value for name, value in content.items() if name in _OPTIONS[kind]}
    unknown = sorted(content.keys() - options.keys() - _FIXED_OF[kind].keys() - _IGNORED)
    if unknown:
        logger.warning("%s has fields unknown here, which are passed over: %s", file, ", ".join(unknown))
    try:
        _check_types(options, _OPTIONS[kind])
        return LanguageModelConfig(
            vocab_size=options["vocab_size"],
            features=options["hidden_size"],
            layers=options["num_hidden_layers"],
            hidden=options["intermediate_size"] or _intermediate_size(options["hidden_size"], options["hidden_ratio"]),
            mixer=_mixer(kind, options),
            context=options["max_position_embeddings"],
            tied=options["tie_word_embeddings"],
            dtype="bfloat16" if content.get("dtype", content.get("torch_dtype")) == "bfloat16" else "float32",
            **_attention(options, KINDS[kind]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of a field of another type, too
        raise InferenceError(f"{file}: {error}") from error


def _check_types(options: dict[str, Any], defaults: dict[str, Any]) -> None:
    for name, default in defaults.items():
        kinds = (float, int) if isinstance(default, float) else (type(default),)
        if default is not None and not isinstance(options[name], kinds):
            raise ValueError(f"{name} is {options[name]!r}; it must be of type {kinds[0].__name__}")


def _intermediate_size(features: int, ratio: int | None) -> int:
    """fla's rule: two thirds of ratio·features, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(features * (ratio or 4) * 2 / 3) / 256)


def _whole(name: str, size: float, parts: int = 1) -> int:
    """size / parts, which must be an integer."""
    if not math.isclose(size, round(size)) or round(size) % parts:
        raise ValueError(f"{name} is {size}; it must be a multiple of {parts}")
    return round(size) // parts


def _mixer(kind: str, options: dict[str, Any]) -> MixerConfig:
    heads = options["num_heads"]
    if kind == "delta_net":
        features, key_heads = options["hidden_size"], heads
        key_dim = _whole("hidden_size · expand_k", features * options["expand_k"], heads)
        value_dim = _whole("hidden_size · expand_v", features * options["expand_v"], heads)
    else:
        key_heads, heads = heads, options["num_v_heads"] or heads
        key_dim = options["head_dim"]
        value_dim = _whole("head_dim · expand_v", key_dim * options["expand_v"])
    return MixerConfig(
        heads=heads,
        key_heads=0 if key_heads == heads else key_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        normalize_queries=True,
        scale=key_dim**-0.5,
        beta_bias=None,
        conv_width=options["conv_size"] if options["use_short_conv"] else 0,
        activation=True,
        output_gate=options["use_gate"],
    )


def _attention(options: dict[str, Any], linear: str) -> dict[str, Any]:
    """mixers and attention, of fla's attn: the layers that are softmax attention."""
    mixers = [linear] * options["num_hidden_layers"]
    attn = options["attn"] or []
    found: set[tuple[Any, ...]] = set()
    windows: set[int] = set()
    for spec in [attn] if isinstance(attn, dict) else attn:
        if spec.get("qkv_bias"):
            raise ValueError("attn.qkv_bias is true; this library has no bias there")
        window, heads = spec.get("window_size"), spec["num_heads"]
        for layer in spec["layers"]:
            if not 0 <= layer < len(mixers):
                raise ValueError(f"attn.layers has {layer}; it must be in [0, {len(mixers)})")
            mixers[layer] = "sliding_window" if window else "softmax"
        windows |= {window} if window else set()
        found.add((heads, spec.get("num_kv_heads") or heads, spec.get("rope_theta", 10_000.0)))
    if not found:
        return dict(mixers=(linear,))
    if len(found) > 1 or len(windows) > 1:
        raise ValueError(
            "attn has layers that differ in heads, window_size or rope_theta; this library has one of each"
        )
    if windows and max(windows) > options["max_position_embeddings"]:
        raise ValueError(f"attn.window_size is {max(windows)}; it must be at most max_position_embeddings")
    heads, key_value_heads, base = found.pop()
    attention = AttentionConfig(
        heads=heads,
        key_value_heads=0 if key_value_heads == heads else key_value_heads,
        head_dim=_whole("hidden_size", options["hidden_size"], heads),
        window=windows.pop() if windows else AttentionConfig().window,
        rope_base=float(base),
    )
    return dict(mixers=_shortest(mixers), attention=attention)


def _shortest(mixers: Sequence[str]) -> tuple[str, ...]:
    """The fewest first names of which all are repetitions."""
    periods = range(1, len(mixers) + 1)
    period = next(p for p in periods if all(name == mixers[i % p] for i, name in enumerate(mixers)))
    return tuple(mixers[:period])


def to_fla(config: LanguageModelConfig) -> dict[str, Any]:
    """The content of fla's config.json for this model.

    Raises:
        InferenceError: fla has no such model, with every reason.
    """
    linear = {name for name in config.block_mixers if name not in ("softmax", "sliding_window")}
    kind = next((kind for kind, name in KINDS.items() if linear == {name}), None)
    if kind is None:
        names = ", ".join(sorted(linear)) or "none"
        raise InferenceError(
            f"fla has no such model: the linear mixers are {names}; they must all be deltanet, or all gated_deltanet"
        )
    reasons = _reasons_against(config, kind)
    if reasons:
        raise InferenceError(f"fla has no such model: {'; '.join(reasons)}")
    mixer = config.mixer
    content: dict[str, Any] = {name: values[0] for name, values in _FIXED_OF[kind].items() if name != "conv_bias"}
    content |= dict(
        architectures=[_CLASSES[kind]], model_type=kind, dtype=config.dtype, vocab_size=config.vocab_size,
        hidden_size=config.features, num_hidden_layers=config.layers, intermediate_size=config.hidden,
        max_position_embeddings=config.context, tie_word_embeddings=config.tied, use_gate=mixer.output_gate,
        use_short_conv=mixer.conv_width > 0, conv_size=mixer.conv_width or _COMMON["conv_size"], attn=_specs(config),
        pad_token_id=None,
    )  # fmt: skip
    if kind == "delta_net":
        key_width, value_width = mixer.heads * mixer.key_dim, mixer.heads * mixer.value_dim
        sizes = dict(
            num_heads=mixer.heads, expand_k=key_width / config.features, expand_v=value_width / config.features
        )
    else:
        sizes = dict(
            num_heads=mixer.key_heads or mixer.heads, num_v_heads=mixer.heads, head_dim=mixer.key_dim,
            expand_v=_factor(mixer.key_dim, mixer.value_dim),
        )  # fmt: skip
    return content | sizes


def _factor(size: int, product: int) -> float:
    """x such that int(size · x), which is how fla rounds, is product."""
    factor = product / size
    return factor if int(size * factor) == product else math.nextafter(factor, math.inf)


def _reasons_against(config: LanguageModelConfig, kind: str) -> list[str]:
    """What fla cannot express of a model whose linear mixers are of its kind."""
    mixer, attention = config.mixer, config.attention
    needed = dict(normalize_queries=True, beta="sigmoid", activation=True, output_norm=True)
    reasons = [
        f"mixer.{name} is {getattr(mixer, name)!r}, must be {value!r}"
        for name, value in needed.items()
        if getattr(mixer, name) != value
    ]
    if not math.isclose(mixer.scale, mixer.key_dim**-0.5):
        reasons.append(f"mixer.scale is {mixer.scale}, must be key_dim^-0.5 = {mixer.key_dim**-0.5:.6g}")
    if kind == "delta_net" and mixer.key_heads not in (0, mixer.heads):
        reasons.append(f"mixer.key_heads is {mixer.key_heads}, must be heads = {mixer.heads}")
    if _specs(config) and attention.heads * attention.head_dim != config.features:
        width = attention.heads * attention.head_dim
        reasons.append(f"attention.heads · head_dim is {width}, must be features = {config.features}")
    return reasons


def _specs(config: LanguageModelConfig) -> dict[str, Any] | list[dict[str, Any]] | None:
    """fla's attn; a list where it has both kinds."""
    attention = config.attention
    specs = []
    for name, window in (("softmax", None), ("sliding_window", min(attention.window, config.context))):
        layers = [number for number, mixer in enumerate(config.block_mixers) if mixer == name]
        if layers:
            specs.append(
                dict(
                    layers=layers, num_heads=attention.heads, num_kv_heads=attention.key_value_heads or attention.heads,
                    qkv_bias=False, window_size=window, rope_theta=attention.rope_base,
                )
            )  # fmt: skip
    return specs[0] if len(specs) == 1 else specs or None
