"""Experiment configs: frozen dataclasses, made by a Python file, overridden by flags, checked when they are made."""

import dataclasses
import importlib.util
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import ml_collections
from absl import flags
from ml_collections import config_flags

from efla_jax.choices import check_choice, nearest
from efla_jax.errors import UserError
from efla_jax.models import ClassifierConfig, LanguageModelConfig, ModelConfig

Schedule = Literal["constant", "cosine"]
Decayed = Literal["all", "matrices"]


class ConfigError(UserError, ValueError):
    """A config file, field or value that does not fit."""


def _require(section: str, config: Any, **least: float) -> None:
    for name, bound in least.items():
        if not getattr(config, name) >= bound:  # NaN is not either
            raise ConfigError(f"{section}.{name} is {getattr(config, name)}; it must be at least {bound}")


@dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    source: mnist, for classifiers; for language models a text source, see `efla_jax.data.text.open_source`: files
    ("corpus/*.jsonl.gz"), python:train, tfds:NAME, hf:NAME. Left empty it is mnist or python:train.
    data_dir: of mnist, the TFDS data directory; None is TFDS's own default.
    The rest is for text. tokenizer: bytes, a tokenizers JSON file, a SentencePiece model, mistral. sequence_length:
    tokens a row. validation: the source that `efla evaluate` takes by default. text_field: of JSON lines and
    Parquet; separator: the line between two documents of a text file. cache_dir: of tokenised text.
    """

    source: str = ""
    data_dir: str | None = None
    tokenizer: str = "bytes"
    sequence_length: int = 512
    validation: str = ""
    text_field: str = "text"
    separator: str | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        _require("config.data", self, sequence_length=2)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate linear over warmup_steps to peak_lr, then constant or a cosine down to end_lr.

    decayed: weight decay shrinks all parameters, or matrices alone (no norms, biases and decay rates).
    """

    peak_lr: float = 1e-3
    start_lr: float = 0.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    end_lr: float = 0.0
    weight_decay: float = 0.01
    decayed: Decayed = "all"
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0  # of the whole gradient; 0 does not clip

    def __post_init__(self):
        check_choice("config.optimizer.schedule", self.schedule, get_args(Schedule))
        check_choice("config.optimizer.decayed", self.decayed, get_args(Decayed))
        _require("config.optimizer", self, peak_lr=0, start_lr=0, warmup_steps=0, end_lr=0, weight_decay=0, clip_norm=0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"config.optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """steps of batch_size records each. checkpoint_every, log_every: in steps. keep: checkpoints kept.

    parts: pieces that a batch is worked off in, one after the other (gradient accumulation). z_loss: factor of the
    squared log-sum-exp of a language model's logits.
    """

    steps: int = 469
    batch_size: int = 128
    checkpoint_every: int = 100
    log_every: int = 10
    keep: int = 3
    seed: int = 0
    parts: int = 1
    z_loss: float = 0.0

    def __post_init__(self):
        _require("config.train", self, steps=1, batch_size=1, checkpoint_every=1, log_every=1, keep=1)
        _require("config.train", self, seed=0, parts=1, z_loss=0)
        if self.batch_size % self.parts:
            raise ConfigError(f"config.train.parts is {self.parts}; it must divide batch_size = {self.batch_size}")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each named axis; -1, on one axis at most, is whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"config.mesh is {sizes}; sizes must be positive, at most one of them -1")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        text = isinstance(self.model, LanguageModelConfig)
        if (self.source == "mnist") == text:
            kind = type(self.model).__name__.removesuffix("Config")
            need = "a text source" if text else f"'mnist'{nearest(self.source, ['mnist'])}"
            raise ConfigError(f"config.data.source is {self.source!r}; for a {kind} it must be {need}")

    @property
    def source(self) -> str:
        """data.source, or where that is empty the one that needs no choice."""
        return self.data.source or ("python:train" if isinstance(self.model, LanguageModelConfig) else "mnist")

    @property
    def record_tokens(self) -> int:
        """Tokens of one record, for throughput."""
        return self.data.sequence_length if isinstance(self.model, LanguageModelConfig) else self.model.tokens


def find_config(name: str) -> Path:
    """A config file: as given, or among those that ship with the package (configs/NAME.py, or just NAME).

    Raises:
        ConfigError: there is none; the message lists those that ship.
    """
    if Path(name).is_file():
        return Path(name)
    package = Path(__file__).parent.parent
    # in a wheel configs/ lies inside the package, in a checkout beside it
    shipped = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), None)
    files = sorted(shipped.glob("*.py")) if shipped else []
    for file in files:
        if Path(name) in (Path(file.name), Path(file.stem), Path("configs", file.name), Path("configs", file.stem)):
            return file
    names = [f"configs/{file.name}" for file in files]
    raise ConfigError(
        f"config is {name!r}, which is no file{nearest(name, names)}; configs that ship: {', '.join(names)}"
    )


def load_config(spec: str) -> Config:
    """spec is FILE or FILE:ARGUMENT; the file's get_config() or get_config(ARGUMENT) makes the config."""
    name, _, argument = spec.partition(":")
    path = find_config(name)
    module_spec = importlib.util.spec_from_file_location(f"efla_jax_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"config is {name!r}; it must be a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(); a config file must define it")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:  # of the argument, or of what the file fills in
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() gave {type(config).__name__}; it must give a Config")
    return config


def _optional_type(annotation: Any) -> type | None:
    """T of `T | None`."""
    if isinstance(annotation, types.UnionType) and type(None) in get_args(annotation):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return None


def _mutable(config: Any) -> ml_collections.ConfigDict:
    """The config's fields as a ConfigDict, whose flags check names and types."""
    hints = typing.get_type_hints(type(config))
    fields = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        optional = _optional_type(hints[entry.name])
        if dataclasses.is_dataclass(value):
            value = _mutable(value)
        elif optional is not None:
            value = ml_collections.config_dict.FieldReference(value, field_type=optional)
        fields[entry.name] = value
    return ml_collections.ConfigDict(fields)


def _frozen(config: Any, values: ml_collections.ConfigDict) -> Any:
    """config with the values of its mutable form; every dataclass checks itself again."""
    changes = {}
    for entry in dataclasses.fields(config):
        old, new = getattr(config, entry.name), values[entry.name]
        changes[entry.name] = _frozen(old, new) if dataclasses.is_dataclass(old) else new
    return dataclasses.replace(config, **changes)


def override(config: Config, arguments: Sequence[str]) -> Config:
    """config with flags such as `--config.optimizer.peak_lr=3e-3` applied.

    Raises:
        ConfigError: a field that does not exist (the nearest is named), or a value of the wrong type or out of range.
    """
    known = field_names(config)
    for argument in arguments:
        option = argument.partition("=")[0]
        if not option.startswith("--config."):
            raise ConfigError(f"{argument!r} is no option of this command")
        name = option.removeprefix("--config.")
        if name not in known:
            raise ConfigError(f"config has no field {name!r}{nearest(name, known)}")
    values = _mutable(config)
    parsed = flags.FlagValues()
    argv = ["efla", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", values, flag_values=parsed, sys_argv=argv)
        parsed(argv)
        return _frozen(config, values)
    except (flags.Error, ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields that hold values."""
    names = []
    for entry in dataclasses.fields(config):
        value, name = getattr(config, entry.name), prefix + entry.name
        names += field_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def to_json(config: Config) -> str:
    """The config as JSON text, which `from_json` reads back."""
    return json.dumps(dataclasses.asdict(config) | {"model": model_fields(config.model)}, indent=2) + "\n"


def model_fields(model: ModelConfig) -> dict[str, Any]:
    """A model's config as JSON has it, which `model_config` reads back; "kind" tells which model it is."""
    return {"kind": type(model).__name__} | dataclasses.asdict(model)


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """Inverse of `model_fields`. Raises KeyError, TypeError or ValueError on what is none."""
    kinds = {kind.__name__: kind for kind in get_args(ModelConfig)}
    return _section(kinds[fields["kind"]], {name: value for name, value in fields.items() if name != "kind"})


def from_json(text: str) -> Config:
    """Inverse of `to_json`.

    Raises:
        ConfigError: the text is no such JSON, a section is missing, or a field is unknown or out of range. A field
            that is left out takes its default.
    """
    try:
        sections = json.loads(text)
        model = model_config(sections.pop("model"))
        rest = {name: _section(kind, sections.pop(name)) for name, kind in _SECTIONS.items()}
        return Config(model=model, **rest, **sections)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"not a config: {error}") from error


def _section(kind: Any, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(**{
        name: _section(hints[name], value) if dataclasses.is_dataclass(hints.get(name)) else value
        for name, value in values.items()
    })  # fmt: skip


_SECTIONS = dict(data=DataConfig, optimizer=OptimizerConfig, train=TrainConfig, mesh=MeshConfig)


def differences(here: Config, there: Config, ignored: Sequence[str] = ()) -> list[str]:
    """'field: A there, B here' for each field in which two configs differ, but for those ignored."""
    flat_here, flat_there = (_flat(json.loads(to_json(config))) for config in (here, there))
    return [
        f"{name}: {flat_there.get(name, '(absent)')!r} there, {flat_here.get(name, '(absent)')!r} here"
        for name in sorted(flat_here.keys() | flat_there.keys())
        if flat_here.get(name, "(absent)") != flat_there.get(name, "(absent)") and not name.startswith(tuple(ignored))
    ]


def _flat(sections: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in sections.items():
        values |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values
