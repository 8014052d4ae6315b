"""fla's checkpoints: the same logits as fla's equations in NumPy, round trips bit for bit, refusals by name."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from efla_jax.cli import main
from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.inference import InferenceError
from efla_jax.inference.folder import load_folder, named_parameters, parameter_shapes, parameters, save_folder
from efla_jax.interop import fla
from efla_jax.interop.fla_config import from_fla, to_fla
from efla_jax.layers import AttentionConfig, MixerConfig
from efla_jax.models import LanguageModelConfig, graph_of
from tests.interop.checkpoints import CASES, DELTA_NET, GATED, draw, shapes, write
from tests.interop.fla_oracle import Oracle
from tests.ops.helpers import EPS, FACTOR, MINIMUM, errors

LENGTH = 11  # more than two convolutions and a window reach


def our_logits(config, params, tokens_T):
    run = jax.jit(lambda params, tokens: _logits(nnx.merge(graph_of(config), params), tokens))
    return np.asarray(run(params, tokens_T[None]))[0]


def _logits(model, tokens_BT):
    return model.logits(model(tokens_BT)[0])


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_flas_equations(tmp_path, name):
    """Within FACTOR times the rounding that the equations themselves make in float32, see tests/ops/helpers.py."""
    content, tensors = CASES[name], draw(CASES[name])
    config, params, tokenizer = fla.load(write(tmp_path / "fla", content, tensors))
    assert tokenizer is None
    tokens = np.random.default_rng(1).integers(0, content["vocab_size"], LENGTH).astype(np.int32)
    want = {"logits": Oracle(content, tensors).logits(tokens)}
    allowed = FACTOR * max(
        errors({"logits": Oracle(content, tensors, np.float32).logits(tokens)}, want)["logits"], MINIMUM * EPS
    )
    assert errors({"logits": our_logits(config, params, tokens)}, want)["logits"] <= allowed


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("float16",), ("bfloat16", "float32", "float16")])
@pytest.mark.parametrize("name", CASES)
def test_from_fla_and_back_keeps_every_bit(tmp_path, name, dtypes):
    content, tensors = CASES[name], draw(CASES[name], dtypes)
    config, params, tokenizer = fla.load(write(tmp_path / "fla", content, tensors))
    fla.save(tmp_path / "back", config, params, tokenizer)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype, key
        assert back[key].tobytes() == tensor.tobytes(), key
    saved = json.loads((tmp_path / "back" / "config.json").read_text())
    assert shapes(saved) == shapes(content)
    assert from_fla(saved, tmp_path) == config
    said_otherwise = {"hidden_ratio", "intermediate_size", "num_v_heads", "attn"}  # defaults are written out
    differing = {key for key in saved.keys() & content.keys() if saved[key] != content[key]}
    assert differing <= said_otherwise


def ours(**changes):
    """A config that fla has, in our terms, and random parameters."""
    mixer = MixerConfig(
        heads=4, key_heads=2, key_dim=6, value_dim=8, normalize_queries=True, scale=6**-0.5, beta_bias=None,
        conv_width=3, activation=True, output_gate=True,
    )  # fmt: skip
    mixer = dataclasses.replace(mixer, **changes.pop("mixer", {}))
    attention = AttentionConfig(heads=2, key_value_heads=1, head_dim=8, window=7, rope_base=300.0)
    names = ("gated_deltanet", "softmax", "gated_deltanet", "sliding_window")
    base = LanguageModelConfig(40, 16, 4, 24, names, mixer, attention, 32, dtype="bfloat16")
    return dataclasses.replace(base, **changes)


def random_parameters(config, **tensors):
    """Parameters of random entries, but for those given by name."""
    rng = np.random.default_rng(3)
    shapes = parameter_shapes(config)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return parameters(config, drawn | tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(mixers=("deltanet",), layers=2, mixer=dict(key_heads=0), attention=AttentionConfig(), dtype="float32"),
        dict(mixers=("gated_deltanet", "softmax"), tied=True, mixer=dict(conv_width=0, key_heads=0)),
    ],
)
def test_to_fla_and_back_is_the_same_model(tmp_path, changes):
    config = ours(**changes)
    params = random_parameters(config)
    fla.save(tmp_path / "fla", config, params, load_tokenizer("bytes"))
    back, loaded, tokenizer = fla.load(tmp_path / "fla")
    if "sliding_window" not in config.mixers:  # what no block uses is not written
        back = dataclasses.replace(back, attention=dataclasses.replace(back.attention, window=config.attention.window))
    assert back == config
    assert tokenizer is not None
    assert tokenizer.fingerprint == load_tokenizer("bytes").fingerprint
    got, want = named_parameters(loaded), named_parameters(params)
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == want[name].tobytes() for name in want)
    saved = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (256, 256)


def test_several_files_are_read_by_their_index(tmp_path):
    tensors = draw(GATED)
    _, one, _ = fla.load(write(tmp_path / "one", GATED, tensors))
    _, several, _ = fla.load(write(tmp_path / "several", GATED, tensors, shards=3))
    got, want = named_parameters(several), named_parameters(one)
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == want[name].tobytes() for name in want)


def test_a_tied_head_may_be_written_twice(tmp_path):
    content = DELTA_NET | dict(tie_word_embeddings=True)
    tensors = draw(content)
    twice = tensors | {"lm_head.weight": tensors["model.embeddings.weight"].copy()}
    fla.load(write(tmp_path / "twice", content, twice))
    twice["lm_head.weight"][0, 0] += 1
    with pytest.raises(InferenceError, match=r"has a tensor 'lm_head\.weight', which the model does not have"):
        fla.load(write(tmp_path / "differing", content, twice))


def test_defaults_are_flas():
    config = from_fla(dict(model_type="delta_net"), Path("config.json"))
    assert (config.features, config.layers, config.hidden, config.vocab_size) == (2048, 24, 5632, 32000)
    assert (config.mixer.heads, config.mixer.key_dim, config.mixer.value_dim) == (16, 128, 128)
    config = from_fla(dict(model_type="gated_deltanet"), Path("config.json"))
    assert (config.layers, config.mixer.heads, config.mixer.key_dim, config.mixer.value_dim) == (21, 6, 256, 512)
    assert config.mixer.output_gate
    assert not config.tied


def test_value_dims_come_back_as_fla_rounds():
    """fla takes int(head_dim · expand_v)."""
    for key_dim in range(1, 130, 3):
        for value_dim in range(1, 260, 7):
            changes = dict(key_dim=key_dim, value_dim=value_dim, scale=key_dim**-0.5)
            content = to_fla(ours(mixer=changes))
            assert int(content["head_dim"] * content["expand_v"]) == value_dim
            assert from_fla(content, Path("config.json")).mixer.value_dim == value_dim


@pytest.mark.parametrize(
    ("base", "option", "value", "message"),
    [
        (DELTA_NET, "model_type", "gla", "model_type is 'gla'; it must be delta_net or gated_deltanet"),
        (DELTA_NET, "allow_neg_eigval", True, "allow_neg_eigval is True"),
        (GATED, "allow_neg_eigval", True, "allow_neg_eigval is True"),
        (DELTA_NET, "use_beta", False, "use_beta is False"),
        (DELTA_NET, "conv_bias", True, "conv_bias is True"),
        (DELTA_NET, "qk_norm", "sum", "qk_norm is 'sum'"),
        (DELTA_NET, "qk_activation", "relu", "qk_activation is 'relu'"),
        (GATED, "output_gate_activation", "sigmoid", "output_gate_activation is 'sigmoid'"),
        (GATED, "hidden_act", "powlu", "hidden_act is 'powlu'"),
        (GATED, "attnres_block_size", 2, "attnres_block_size is 2"),
        (DELTA_NET, "norm_eps", 1e-5, "norm_eps is 1e-05"),
        (DELTA_NET, "expand_k", 0.55, "hidden_size · expand_k is 8.8"),
        (DELTA_NET, "num_heads", 3, "hidden_size · expand_k is 8.0; it must be a multiple of 3"),
        (DELTA_NET, "num_heads", "many", "num_heads is 'many'; it must be of type int"),
        (DELTA_NET, "expand_k", None, "expand_k is None; it must be of type float"),
        (GATED, "num_v_heads", 3, "key_heads is 2"),
        (GATED, "attn", dict(layers=[0], num_heads=2, qkv_bias=True), "attn.qkv_bias is true"),
        (GATED, "attn", dict(layers=[2], num_heads=2), r"attn.layers has 2; it must be in \[0, 2\)"),
        (GATED, "attn", [dict(layers=[n], num_heads=n + 1) for n in (0, 1)], "attn has layers that differ"),
        (GATED, "attn", dict(layers=[0], num_heads=2, window_size=65), "attn.window_size is 65"),
        (GATED, "attn", dict(num_heads=2), "'layers'"),
    ],
)
def test_what_our_model_cannot_express_is_refused_by_name(tmp_path, base, option, value, message):
    write(tmp_path, base | {option: value}, {})
    with pytest.raises(InferenceError, match=rf"config\.json: .*{message}"):
        fla.load(tmp_path)


def test_fields_that_are_unknown_are_named(tmp_path, caplog):
    fla.load(write(tmp_path, DELTA_NET | dict(use_novelty=True), draw(DELTA_NET)))
    assert "fields unknown here, which are passed over: use_novelty" in caplog.text
    caplog.clear()
    fla.load(write(tmp_path, DELTA_NET, draw(DELTA_NET)))
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mixers=("efla",)), "the linear mixers are efla; they must all be deltanet, or all gated_deltanet"),
        (dict(mixers=("gated_efla", "softmax")), "the linear mixers are gated_efla"),
        (dict(mixers=("deltanet", "gated_deltanet")), "the linear mixers are deltanet, gated_deltanet"),
        (dict(mixers=("softmax",)), "the linear mixers are none"),
        (dict(mixers=("deltanet",)), "mixer.key_heads is 2, must be heads = 4"),
        (dict(mixer=dict(normalize_queries=False)), "mixer.normalize_queries is False, must be True"),
        (dict(mixer=dict(beta="softplus")), "mixer.beta is 'softplus', must be 'sigmoid'"),
        (dict(mixer=dict(activation=False)), "mixer.activation is False"),
        (dict(mixer=dict(output_norm=False)), "mixer.output_norm is False"),
        (dict(mixer=dict(scale=1.0)), r"mixer.scale is 1.0, must be key_dim\^-0.5 = 0.408248"),
        (
            dict(attention=AttentionConfig(heads=2, head_dim=4)),
            "attention.heads · head_dim is 8, must be features = 16",
        ),
    ],
)
def test_what_fla_cannot_express_is_refused_by_name(changes, message):
    with pytest.raises(InferenceError, match=rf"fla has no such model: .*{message}"):
        to_fla(ours(**changes))


def test_a_bias_of_beta_is_refused_unless_it_is_zero(tmp_path):
    config = ours(mixers=("gated_deltanet",), layers=1, mixer=dict(beta_bias=0.0))
    name = "blocks/0/mixer/beta/bias"
    fla.save(tmp_path / "zero", config, random_parameters(config, **{name: np.zeros(4, np.float32)}), None)
    fla.load(tmp_path / "zero")
    with pytest.raises(InferenceError, match=f"parameter '{name}' is not 0"):
        fla.save(tmp_path / "one", config, random_parameters(config), None)
    assert not (tmp_path / "one").exists()


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def _change(name, change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")

    return damage


KEY = "model.layers.1.attn.k_proj.weight"
CONVOLUTION = "model.layers.0.attn.q_conv1d.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is no checkpoint of fla"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is damaged: it must hold an object"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (_truncate, r"model\.safetensors is damaged or truncated"),
        (_change(KEY, lambda x: None), rf"has no tensor '{KEY}'; the model needs it, of shape \[8, 16\]"),
        (_change(KEY, lambda x: x[1:]), rf"'{KEY}' has shape \[7, 16\]; it must be \[8, 16\]"),
        (_change(KEY, lambda x: x.astype(np.int32)), rf"'{KEY}' is int32; it must be one of float32"),
        (_change(CONVOLUTION, lambda x: x[:, :, 1:].copy()), r"has shape \[8, 1, 3\]; it must be \[8, 1, 4\]"),
        (_change(CONVOLUTION, lambda x: x[:, 0].copy()), r"has shape \[8, 4\]; it must be \[8, 1, 4\]"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path, damage, message):
    damage(write(tmp_path, DELTA_NET, draw(DELTA_NET)))
    with pytest.raises(InferenceError, match=message):
        fla.load(tmp_path)


def test_what_is_wrong_with_a_checkpoint_of_several_files_is_named(tmp_path):
    write(tmp_path, DELTA_NET, draw(DELTA_NET), shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name, file = sorted(index["weight_map"].items())[0]
    del index["weight_map"][name]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InferenceError, match=f"{file} and model.* differ: tensor '{name}' is in only one"):
        fla.load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InferenceError, match=f"{file} is missing"):
        fla.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InferenceError, match="it has no weight_map"):
        fla.load(tmp_path)


def test_import_and_export_on_the_command_line(tmp_path, capsys):
    content = DELTA_NET | dict(vocab_size=257)
    tensors = draw(content)
    write(tmp_path / "fla", content, tensors)
    with pytest.raises(SystemExit):
        main(["import", "--format=fla", f"--input={tmp_path / 'fla'}", f"--output={tmp_path / 'ours'}"])
    assert "has no tokenizer" in capsys.readouterr().err
    main(
        ["import", "--format=fla", f"--input={tmp_path / 'fla'}", f"--output={tmp_path / 'ours'}", "--tokenizer=bytes"]
    )
    config, params, tokenizer = load_folder(tmp_path / "ours")
    assert (config.mixers, tokenizer.name) == (("deltanet",), "bytes")
    main(["export", "--format=fla", f"--workdir={tmp_path / 'ours'}", f"--output={tmp_path / 'back'}"])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: x.tobytes() for name, x in back.items()} == {name: x.tobytes() for name, x in tensors.items()}
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}\n{tmp_path / 'back'}\n"
    efla = dataclasses.replace(config, mixers=("efla",))
    save_folder(tmp_path / "efla", efla, params, tokenizer)
    with pytest.raises(SystemExit):
        main(["export", "--format=fla", f"--workdir={tmp_path / 'efla'}", f"--output={tmp_path / 'no'}"])
    assert "fla has no such model: the linear mixers are efla" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
