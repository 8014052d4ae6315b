"""The model folder: what was saved comes back, whatever is wrong with a folder is named, output is whole or absent."""

import json
import resource
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.inference import InferenceError
from efla_jax.inference.folder import load_folder, named_parameters, parameter_shapes, parameters, save_folder
from tests.inference.small import HYBRID

KEY = "blocks/0/mixer/key/kernel"


def random_parameters(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(HYBRID)
    return parameters(HYBRID, {name: rng.normal(size=shape).astype(np.dtype(dtype)) for name, shape in shapes.items()})


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "model", HYBRID, random_parameters(), load_tokenizer("bytes"))
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_saved_is_loaded(tmp_path, dtype):
    params, tokenizer = random_parameters(dtype), load_tokenizer("bytes")
    save_folder(tmp_path / "model", HYBRID, params, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    held = sorted(str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*"))
    assert held == ["config.json", "model.safetensors", "tokenizer", "tokenizer/tokenizer.json"]
    config, loaded, found = load_folder(tmp_path / "model")
    assert config == HYBRID
    assert found.fingerprint == tokenizer.fingerprint
    got, want = named_parameters(loaded), named_parameters(params)
    assert got.keys() == want.keys() == parameter_shapes(HYBRID).keys()
    assert KEY in got
    for name, tensor in want.items():
        assert got[name].dtype == np.dtype(dtype)
        assert got[name].tobytes() == tensor.tobytes(), name


def test_names_and_shapes_are_readable_without_our_code(folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors[KEY].shape == (HYBRID.features, HYBRID.mixer.heads * HYBRID.mixer.key_dim)
    content = json.loads((folder / "config.json").read_text())
    assert (content["format"], content["version"]) == ("efla_jax", 1)
    assert content["model"]["mixers"] == list(HYBRID.mixers)


def test_output_that_is_there_is_refused_unless_it_is_empty(tmp_path):
    params, tokenizer = random_parameters(), load_tokenizer("bytes")
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "empty", HYBRID, params, tokenizer)
    load_folder(tmp_path / "empty")
    before = (tmp_path / "empty" / "config.json").read_bytes()
    with pytest.raises(InferenceError, match="which is there already; it must be a new or an empty folder"):
        save_folder(tmp_path / "empty", HYBRID, params, tokenizer)
    assert (tmp_path / "empty" / "config.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InferenceError, match="which is there already"):
        save_folder(tmp_path / "file", HYBRID, params, tokenizer)
    with pytest.raises(InferenceError, match="which cannot be written"):
        save_folder(tmp_path / "file" / "below", HYBRID, params, tokenizer)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_save_that_fails_leaves_nothing(tmp_path):
    """Files may grow no further than a third of the parameters, as on a disk that is full."""
    params = random_parameters()
    size = sum(tensor.nbytes for tensor in named_parameters(params).values())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 3, limits[1]))
    try:
        with pytest.raises(InferenceError, match=r"output is '.*model', which cannot be written"):
            save_folder(tmp_path / "model", HYBRID, params, load_tokenizer("bytes"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def _tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _bytes(change, name="model.safetensors"):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _content(**changes):
    def damage(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_bytes(lambda raw: b""), r"model\.safetensors is damaged or truncated"),
        (_bytes(lambda raw: raw[:100]), r"model\.safetensors is damaged or truncated"),
        (_bytes(lambda raw: raw[:-1]), r"model\.safetensors is damaged or truncated"),
        (_bytes(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), r"model\.safetensors is damaged: its sha256"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (_tensors(lambda x: x.pop(KEY)), rf"safetensors has no tensor '{KEY}'; the model needs it, of shape \[16, 8\]"),
        (_tensors(lambda x: x.update(more=x[KEY])), "safetensors has a tensor 'more', which the model does not have"),
        (
            _tensors(lambda x: x.update({KEY: x[KEY].T.copy()})),
            rf"safetensors: tensor '{KEY}' has shape \[8, 16\]; it must be \[16, 8\]",
        ),
        (
            _tensors(lambda x: x.update({KEY: x[KEY].astype(np.float64)})),
            rf"safetensors: tensor '{KEY}' is float64; it must be one of float32, bfloat16, float16",
        ),
        (_tensors(lambda x: x.update({KEY: x[KEY] + 1})), r"model\.safetensors is damaged: its sha256"),
        (lambda folder: (folder / "config.json").unlink(), "is no model folder"),
        (_bytes(lambda raw: raw[:50], "config.json"), r"config\.json is damaged"),
        (_bytes(lambda raw: b"[1]", "config.json"), r"config\.json is damaged"),
        (_content(format="other"), r"config\.json is of format 'other', version 1; it must be 'efla_jax', 1"),
        (_content(version=2), r"config\.json is of format 'efla_jax', version 2"),
        (_content(model={"kind": "LanguageModelConfig", "width": 3}), r"config\.json is damaged: .*width"),
        (_content(model={"kind": "ClassifierConfig"}), r"config\.json is of a ClassifierConfig"),
        (_content(sha256={}), r"config\.json is damaged"),
        (_bytes(lambda raw: b"{}", "tokenizer/tokenizer.json"), "tokenizer is missing or damaged"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "tokenizer is missing or damaged"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InferenceError, match=message):
        load_folder(folder)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(InferenceError, match="is no model folder"):
        load_folder(tmp_path / "absent")
