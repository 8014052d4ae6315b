"""Configs: made by files, overridden by flags, checked and frozen, written to JSON and read back."""

import dataclasses
import json
import re
import shutil
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from efla_jax.models import ClassifierConfig, LanguageModelConfig, LastStateConfig
from efla_jax.training import config as config_module
from efla_jax.training.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    differences,
    field_names,
    find_config,
    from_json,
    load_config,
    override,
    to_json,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
SPECS = [f"configs/{file.name}{argument}" for file in FILES for argument in ("", ":efla", ":deltanet")]


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


# ---- overrides ----


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.steps", "7", 7),
        ("train.seed", "0", 0),
        ("optimizer.peak_lr", "3e-3", 3e-3),
        ("optimizer.peak_lr", "1", 1.0),
        ("optimizer.schedule", "cosine", "cosine"),
        ("data.data_dir", "/some/where=1", "/some/where=1"),
        ("model.features", "32", 32),
        ("model.mixer.normalize_keys", "true", True),
        ("model.mixer.output_norm", "false", False),
        ("model.mixer.integrator", "rk4", "rk4"),
    ],
)
def test_override(name, text, value):
    config = Config()
    changed = override(config, [f"--config.{name}={text}"])
    assert value_of(changed, name) == value
    assert type(value_of(changed, name)) is type(value)
    others = [other for other in field_names(config) if other != name]
    assert [value_of(changed, other) for other in others] == [value_of(config, other) for other in others]
    assert config == Config()  # the one overridden is as it was


def test_several_overrides_and_none():
    config = override(Config(), ["--config.train.steps=7", "--config.train.seed=3", "--config.train.steps=8"])
    assert (config.train.steps, config.train.seed) == (8, 3)
    assert override(config, []) == config


def test_a_config_is_frozen():
    config: Any = override(Config(), ["--config.train.steps=7"])
    for section, name in ((config, "train"), (config.train, "steps"), (config.model.mixer, "heads")):
        with pytest.raises(FrozenInstanceError):
            setattr(section, name, 1)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.step=7", "config has no field 'train.step'; did you mean 'train.steps'"),
        ("--config.optimiser.peak_lr=1", "no field 'optimiser.peak_lr'; did you mean 'optimizer.peak_lr'"),
        ("--config.model.mixer.integrater=exact", "did you mean 'model.mixer.integrator'"),
        ("--config.train=7", "config has no field 'train'"),
        ("--config.train.steps=many", "train.steps"),
        ("--config.train.steps=1.5", "train.steps"),
        ("--config.train.steps", "train.steps"),
        ("--config.optimizer.peak_lr=fast", "optimizer.peak_lr"),
        ("--config.model.mixer.normalize_keys=maybe", "model.mixer.normalize_keys"),
        ("--config.optimizer.schedule=cosin", "config.optimizer.schedule is 'cosin'.*did you mean 'cosine'"),
        ("--config.data.source=mnits", "config.data.source is 'mnits'.*did you mean 'mnist'"),
        ("--config.model.mixer.beta=sigmod", "beta is 'sigmod'.*did you mean 'sigmoid'"),
        ("--config.data.source=python:train", "source is 'python:train'; for a Classifier it must be 'mnist'"),
        ("--config.train.steps=0", "config.train.steps is 0; it must be at least 1"),
        ("--config.train.seed=-1", "config.train.seed is -1; it must be at least 0"),
        ("--config.optimizer.peak_lr=-1", "config.optimizer.peak_lr is -1.0; it must be at least 0"),
        ("--config.optimizer.peak_lr=nan", "config.optimizer.peak_lr is nan"),
        ("--config.optimizer.beta2=1", "config.optimizer.beta2 is 1.0; it must be in "),
        ("--config.mesh.data=0", "config.mesh is "),
        ("--config.model.pixels_per_token=27", "pixels_per_token is 27; it must divide the 784 pixels"),
        ("--workdirs=x", "'--workdirs=x' is no option of this command"),
        ("config.train.steps=7", "'config.train.steps=7' is no option"),
        ("7", "'7' is no option of this command"),
    ],
)
def test_a_bad_override_is_named(argument, message):
    with pytest.raises(ConfigError, match=message):
        override(Config(), [argument])


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (TrainConfig, dict(steps=0)),
        (TrainConfig, dict(batch_size=0)),
        (TrainConfig, dict(checkpoint_every=0)),
        (TrainConfig, dict(log_every=0)),
        (TrainConfig, dict(keep=0)),
        (TrainConfig, dict(parts=0)),
        (TrainConfig, dict(parts=3, batch_size=8)),
        (TrainConfig, dict(z_loss=-1.0)),
        (DataConfig, dict(sequence_length=1)),
        (OptimizerConfig, dict(warmup_steps=-1)),
        (OptimizerConfig, dict(start_lr=-1.0)),
        (OptimizerConfig, dict(decayed="matrix")),
        (OptimizerConfig, dict(end_lr=-1.0)),
        (OptimizerConfig, dict(weight_decay=-0.1)),
        (OptimizerConfig, dict(clip_norm=-1.0)),
        (OptimizerConfig, dict(beta1=-0.1)),
        (MeshConfig, dict(data=-1, fsdp=-1)),
        (MeshConfig, dict(tensor=-2)),
    ],
)
def test_a_section_checks_itself(section, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}|config.mesh") as error:
        section(**changes)
    assert str(next(iter(changes.values()))) in str(error.value)


# ---- files ----


def config_file(folder, body):
    file = folder / "mine.py"
    file.write_text(f"from efla_jax.training.config import Config, TrainConfig\n{body}\n")
    return str(file)


def test_a_file_and_its_argument(tmp_path):
    file = config_file(tmp_path, "def get_config(steps='5'):\n    return Config(train=TrainConfig(steps=int(steps)))")
    assert load_config(file).train.steps == 5
    assert load_config(f"{file}:9").train.steps == 9


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", r"mine.py has no get_config\(\)"),
        ("def get_config():\n    return {'train': 1}", r"mine.py: get_config\(\) gave dict; it must give a Config"),
        ("def get_config():\n    return Config(train=TrainConfig(steps=0))", "mine.py: config.train.steps is 0"),
    ],
)
def test_a_bad_file_is_named(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file(tmp_path, body))


def test_a_file_that_is_not_python(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 1\n")
    with pytest.raises(ConfigError, match=r"config.yaml'; it must be a Python file"):
        load_config(str(tmp_path / "config.yaml"))


def test_a_missing_file_lists_those_that_ship():
    with pytest.raises(ConfigError, match=r"is no file; did you mean 'configs/smnist\.py'") as error:
        load_config("config/smnst.py")
    assert all(f"configs/{file.name}" in str(error.value) for file in FILES)


def test_a_shipped_config_is_not_taken_for_another_folders():
    with pytest.raises(ConfigError, match="is no file"):
        find_config("my/own/smnist.py")


@pytest.mark.parametrize("name", ["smnist", "smnist.py", "configs/smnist", "configs/smnist.py"])
def test_shipped_configs_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / "configs" / "smnist.py"


def test_shipped_configs_are_found_in_an_installed_package(tmp_path, monkeypatch):
    """In a wheel configs/ lies inside the package: see [tool.hatch.build.targets.wheel.sources] in pyproject.toml."""
    package = tmp_path / "site-packages" / "efla_jax"
    shutil.copytree(ROOT / "configs", package / "configs")
    (tmp_path / "site-packages" / "configs").mkdir()  # another package's, which must not be taken
    monkeypatch.setattr(config_module, "__file__", str(package / "training" / "config.py"))
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/smnist_paper.py") == package / "configs" / "smnist_paper.py"
    assert value_of(load_config("smnist_paper:deltanet"), "model.integrator") == "euler"


def test_a_file_at_hand_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "smnist.py", tmp_path / "configs")
    assert find_config("configs/smnist.py").resolve() == tmp_path / "configs" / "smnist.py"


@pytest.mark.parametrize("spec", SPECS)
def test_every_shipped_config(spec):
    config = load_config(spec)
    assert from_json(to_json(config)) == config
    deltanet = spec.endswith(":deltanet")
    if isinstance(config.model, LanguageModelConfig):
        assert config.model.mixers == (("deltanet",) if deltanet else ("efla",))
        return
    rule: Any = config.model.mixer if isinstance(config.model, ClassifierConfig) else config.model
    assert (rule.integrator, rule.normalize_keys) == (("euler", True) if deltanet else ("exact", False))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_gives_its_command(file):
    text = file.read_text()
    commands = re.findall(r"efla train --config=(\S+) --workdir=\S+", text.split('"""')[1])
    assert commands
    assert all(command.partition(":")[0] == f"configs/{file.name}" for command in commands)
    for command in commands:
        load_config(command)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_wrong_argument_of_a_shipped_config_is_named(file):
    with pytest.raises(ConfigError, match=r"'elfa'; it must be (efla or deltanet|one of efla, .*)"):
        load_config(f"configs/{file.name}:elfa")


def test_rules_differ_in_the_rule_alone():
    for file in FILES:
        found = differences(load_config(f"configs/{file.name}:deltanet"), load_config(f"configs/{file.name}:efla"))
        fields = sorted(line.partition(":")[0].rpartition(".")[2] for line in found)
        assert fields in (["integrator", "normalize_keys"], ["mixers"])


def test_each_kind_of_model_has_a_source_of_its_own():
    assert Config().source == "mnist"
    text = Config(model=LanguageModelConfig())
    assert (text.source, text.record_tokens) == ("python:train", 512)
    with pytest.raises(ConfigError, match="source is 'mnist'; for a LanguageModel it must be a text source"):
        dataclasses.replace(text, data=DataConfig(source="mnist"))


# ---- JSON ----


def test_json_keeps_every_value():
    config = Config(
        model=LastStateConfig(features=8, beta="softplus"),
        data=DataConfig(data_dir="/data"),
        optimizer=OptimizerConfig(peak_lr=0.1 + 0.2, clip_norm=0.0),
        mesh=MeshConfig(data=2, fsdp=-1),
    )
    assert from_json(to_json(config)) == config
    assert json.loads(to_json(config))["model"]["kind"] == "LastStateConfig"


def broken(section, **changes):
    sections = json.loads(to_json(Config()))
    if section:
        sections[section] |= changes
    else:
        sections |= changes
    return json.dumps(sections)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a config"),
        (to_json(Config())[:-20], "not a config"),
        ("[]", "not a config"),
        ('{"model": 3}', "not a config"),
        ("{}", "model"),
        (json.dumps({k: v for k, v in json.loads(to_json(Config())).items() if k != "train"}), "train"),
        (broken("model", kind="Transformer"), "Transformer"),
        (broken("train", stepz=3), "stepz"),
        (broken("train", steps=0), "train.steps is 0"),
        (broken("train", steps="5"), "not a config"),
        (broken(None, extra={}), "extra"),
    ],
)
def test_broken_json_is_a_config_error(text, message):
    with pytest.raises(ConfigError, match=message):
        from_json(text)


# ---- differences ----


def test_differences_name_the_fields():
    here = override(Config(), ["--config.train.seed=3", "--config.model.mixer.heads=2", "--config.mesh.fsdp=2"])
    assert differences(Config(), Config()) == []
    assert differences(here, Config()) == [
        "mesh.fsdp: 1 there, 2 here",
        "model.mixer.heads: 4 there, 2 here",
        "train.seed: 0 there, 3 here",
    ]
    assert differences(here, Config(), ("mesh.", "train.seed")) == ["model.mixer.heads: 4 there, 2 here"]


def test_differences_of_models_of_two_kinds():
    found = differences(Config(), dataclasses.replace(Config(), model=LastStateConfig()))
    assert "model.kind: 'LastStateConfig' there, 'ClassifierConfig' here" in found
    assert "model.layers: '(absent)' there, 2 here" in found
