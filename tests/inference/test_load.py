"""Loading from whatever folder holds a model, and the command that generates text."""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import efla_jax
from efla_jax import cli
from efla_jax.data.pipeline import batches
from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.inference.folder import save_folder
from efla_jax.inference.load import load_parts
from efla_jax.models import ClassifierConfig, build
from efla_jax.training.checkpoint import Checkpoints
from efla_jax.training.config import Config, to_json
from efla_jax.training.loop import keep_tokenizer
from tests.inference.small import ENDLESS, HYBRID, parameters, text_model


def save_run(path, config, params):
    """What a run leaves behind, but for its optimizer state, which nobody reads who only runs the model."""
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    records: Any = [dict(x=np.zeros(1))] * 4
    data = batches(records, batch_size=1, seed=0, process_index=0, process_count=1)
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params}, data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "workdir"
    save_run(path, Config(model=ENDLESS), parameters(ENDLESS))
    keep_tokenizer(path, load_tokenizer("bytes"))
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "model"
    save_folder(path, HYBRID, parameters(HYBRID), load_tokenizer("bytes"))
    return path


def test_a_workdir_is_loaded(workdir):
    model, want = efla_jax.load(workdir), text_model(ENDLESS)
    assert model.config == ENDLESS
    assert model.generate("abc", 6) == want.generate("abc", 6)
    state = model.prefill("abc")  # the same parameters to the bit: a state of one is one of the other
    assert want.generate("d", 6, state=state) == want.generate("abcd", 6)


def test_a_model_folder_is_loaded(model_folder):
    model = efla_jax.load(str(model_folder))
    assert model.generate("abc", 6) == text_model().generate("abc", 6)
    config, _, tokenizer = load_parts(model_folder)
    assert (config, tokenizer.vocab_size) == (HYBRID, 257)


def test_a_tokenizer_can_be_named(model_folder, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": [{"id": 2, "content": '
        '"<eos>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]}'
    )
    assert efla_jax.load(model_folder, tokenizer=file).tokenizer.separator == 2


def test_what_holds_no_language_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no model: .*No such file"):
        efla_jax.load(tmp_path / "nowhere")
    for content in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            efla_jax.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a config"):
        efla_jax.load(tmp_path)


def test_a_classifier_is_refused(tmp_path):
    config = Config(model=ClassifierConfig(features=4, layers=1, hidden=4))
    form = nnx.eval_shape(lambda: nnx.state(build(config.model, rngs=nnx.Rngs(0)), nnx.Param))
    save_run(tmp_path / "run", config, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form))
    with pytest.raises(ValueError, match="holds a ClassifierConfig; it must be a language model"):
        efla_jax.load(tmp_path / "run")


def test_a_tokenizer_that_does_not_fit_is_refused(model_folder, tmp_path):
    """The checkpoint's vocabulary is smaller than that of the tokenizer beside it."""
    file = tmp_path / "big.json"
    vocabulary = {chr(0x4E00 + number): number for number in range(300)}
    eos = dict(id=300, content="<eos>", special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    model = dict(type="BPE", vocab=vocabulary, merges=[])
    file.write_text(json.dumps(dict(model=model, added_tokens=[eos])))
    with pytest.raises(ValueError, match=r"tokenizer '.*big.json' has vocab_size 301, the model 260"):
        efla_jax.load(model_folder, tokenizer=file)


def test_the_ops_are_imported_without_what_models_need():
    heavy = ("flax", "orbax", "safetensors", "grain")
    code = f"import sys, efla_jax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- efla generate ----


def run(capsys, *arguments):
    cli.main(["generate", *arguments])
    return capsys.readouterr().out


def test_generate_prints_the_completion_alone(capsys, model_folder, tmp_path):
    model, folder = text_model(), f"--workdir={model_folder}"
    want = model.generate("naïve", 9)
    assert run(capsys, folder, "--prompt=naïve", "--max_new_tokens=9", "--temperature=0") == want + "\n"
    (tmp_path / "prompt").write_text("naïve", "utf-8")
    stop, file = want[4:6], str(tmp_path / "prompt")
    stopped = run(capsys, folder, "--prompt_file", file, "--max_new_tokens", "9", "--stop", stop)
    assert stopped == want.partition(stop)[0] + "\n"
    settings = dict(temperature=0.9, top_k=30, top_p=0.9, seed=4, max_new_tokens=9)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert run(capsys, folder, "--prompt=", "--stream", *flags) == model.generate("", **settings) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=x"], "--workdir=… or --artifact=… must say where the model is"),
        (["--workdir=x", "--artifact=y"], "and not both"),
        (["--workdir=nowhere", "--prompt=x"], "nowhere holds no model"),
        (["--workdir=x", "--prmpt=x"], "unknown option '--prmpt=x'; did you mean '--prompt'?"),
        (["--workdir=x", "--streem"], "did you mean '--stream'?"),
        (["--workdir=x", "--max_new_tokens=many"], "--max_new_tokens is 'many'; it must be an integer"),
        (["--workdir=x", "--temperature=hot"], "--temperature is 'hot'; it must be a number"),
        (["--workdir=x", "--prompt=x", "--prompt_file=y"], "--prompt and --prompt_file are both given"),
        (["--workdir=x", "--prompt_file=nowhere"], "--prompt_file is 'nowhere', which cannot be read"),
    ],
)
def test_bad_command_lines_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)


def test_bad_requests_are_one_line(capsys, model_folder):
    folder = f"--workdir={model_folder}"
    assert "the prompt has 41 tokens" in refused(capsys, folder, f"--prompt={'x' * 40}")
    assert "max_new_tokens is 0" in refused(capsys, folder, "--prompt=x", "--max_new_tokens=0")
    assert "top_p is 2.0" in refused(capsys, folder, "--prompt=x", "--top_p=2", "--stream")


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(["generate", *arguments])
    out, err = capsys.readouterr()
    assert (error.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("efla generate: ")
    return err
