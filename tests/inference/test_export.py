"""Exported programs: the same text and logits as the model's own, one artifact a platform, damage is named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from efla_jax.cli import main
from efla_jax.data.text.tokenizers import load_tokenizer
from efla_jax.inference import InferenceError, export
from efla_jax.inference.export import ExportedPrograms, export_model, load_artifact
from efla_jax.inference.folder import load_folder, named_parameters, save_folder
from efla_jax.inference.text import TextModel
from efla_jax.training.config import Config
from efla_jax.training.loop import keep_tokenizer
from tests.inference.small import ENDLESS, HYBRID, draw_tokens, parameters, programs
from tests.inference.test_load import save_run
from tests.ops.helpers import EPS, FACTOR

BATCH_SIZES, LENGTHS = (1, 2), (1, 4)
PROMPTS = ["def f", "", "ein längerer Text"]  # more than a batch; longer than the longest program


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model"
    tokenizer = load_tokenizer("bytes")
    export_model(path, HYBRID, parameters(HYBRID), tokenizer, batch_sizes=BATCH_SIZES, lengths=LENGTHS)
    return path


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def exported(artifact):
    return ExportedPrograms(artifact / "programs", "cpu", BATCH_SIZES, LENGTHS)


def run(served, params, cache, steps):
    """The logits after each of several forward calls on two rows, one of them ragged."""
    logits = []
    for length, lengths in steps:
        tokens = draw_tokens(2, length, seed=length)
        logits_BV, cache = served.forward(params, tokens, np.array(lengths, np.int32), cache)
        logits.append(np.asarray(logits_BV))
    return np.stack(logits)


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_are_those_of_the_model(artifact, seed):
    """With seed 1 of parameters that the export never saw: they are arguments. Rounding alone may differ."""
    own, params = programs(HYBRID), parameters(HYBRID, seed)
    steps = [(4, (4, 2)), (1, (1, 1)), (4, (3, 4)), (1, (1, 1))]
    want = run(own, params, own.empty_cache(2), steps)
    served = exported(artifact)
    got = run(served, named_parameters(params), served.empty_cache(2), steps)
    assert got.dtype == np.float32
    assert np.linalg.norm(got - want) <= FACTOR * EPS * np.linalg.norm(want)
    assert served.vocab_size == HYBRID.vocab_size


@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, top_k=20, seed=3)])
def test_text_is_that_of_the_model(artifact, options):
    text = load_artifact(artifact).generate(PROMPTS, 8, **options)
    assert text == _own(artifact).generate(PROMPTS, 8, **options)
    assert any(text)


def test_bursts_are_those_of_the_model(artifact):
    model = _own(artifact)
    want = ["".join(model.stream(prompt, 18)) for prompt in PROMPTS[:2]]  # one token at a time
    assert model.generate(PROMPTS[:2], 18) == want
    assert load_artifact(artifact).generate(PROMPTS[:2], 18) == want


def _own(path):
    return TextModel(*load_folder(path), programs(HYBRID))


def test_one_artifact_a_platform_and_shape(artifact):
    content = json.loads((artifact / "programs" / "manifest.json").read_text())["content"]
    assert content["implementations"] == {"cpu": "xla", "cuda": "xla", "tpu": "xla"}
    names = {f"{p}-b{b}-l{n}.bin" for p in ("cpu", "cuda", "tpu") for b in BATCH_SIZES for n in LENGTHS}
    assert {path.name for path in (artifact / "programs").iterdir()} == names | {"manifest.json"}
    assert content["files"].keys() == names
    for name in names:
        platform, batch, length = name.removesuffix(".bin").split("-")
        program = jax.export.deserialize(bytearray((artifact / "programs" / name).read_bytes()))
        assert program.platforms == (platform,)
        (params, tokens, lengths, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        assert (tokens.shape, lengths.shape) == ((int(batch[1:]), int(length[1:])), (int(batch[1:]),))
        assert params.keys() == named_parameters(parameters(HYBRID)).keys()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_program_runs_on_its_platform_alone(artifact, platform):
    served = ExportedPrograms(artifact / "programs", platform, BATCH_SIZES, LENGTHS)
    cache, tokens = served.empty_cache(1), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match=rf"for platforms '\('{platform}',\)'.*cpu"):
        served.forward(named_parameters(parameters(HYBRID)), tokens, np.ones(1, np.int32), cache)


def test_the_implementation_is_the_one_that_is_named(monkeypatch):
    """Of a name that serves no call the export fails; it does not take another."""
    monkeypatch.setitem(export.IMPLEMENTATIONS, "cuda", "pallas_gpu")
    with pytest.raises(NotImplementedError, match="pallas_gpu"):
        export.export_program(HYBRID, parameters(HYBRID), "cuda", 1, 4)


def test_gpu_kernels_are_exported(tmp_path):
    """Of a model with heads that they take: prefill and decoding have their kernel, in the files too."""
    mixer = dataclasses.replace(ENDLESS.mixer, key_dim=64, value_dim=64)
    config = dataclasses.replace(ENDLESS, mixer=mixer, dtype="bfloat16")
    export_model(
        tmp_path / "new", config, parameters(config), load_tokenizer("bytes"), platforms=["cuda"], batch_sizes=[1],
        lengths=[1, 64], implementations={"cuda": "pallas_gpu"},
    )  # fmt: skip
    programs = tmp_path / "new" / "programs"
    content = json.loads((programs / "manifest.json").read_text())["content"]
    assert content["implementations"] == {"cuda": "pallas_gpu"}
    for length in (1, 64):
        program = jax.export.deserialize(bytearray((programs / f"cuda-b1-l{length}.bin").read_bytes()))
        assert "mosaic_gpu" in program.mlir_module()


def test_a_platform_without_programs_is_refused_with_those_there(tmp_path, artifact):
    params, tokenizer = parameters(HYBRID), load_tokenizer("bytes")
    export_model(tmp_path / "cuda", HYBRID, params, tokenizer, platforms=["cuda", "tpu"], batch_sizes=[1], lengths=[1])
    with pytest.raises(InferenceError, match="no programs for cpu, on which this runs; it has cuda, tpu"):
        load_artifact(tmp_path / "cuda")


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _other_parameters(copy):
    config, _, tokenizer = load_folder(copy)
    shutil.move(copy / "programs", copy.parent / "programs")
    shutil.rmtree(copy)
    save_folder(copy, config, parameters(HYBRID, 1), tokenizer)
    shutil.move(copy.parent / "programs", copy / "programs")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda copy: _flip(copy / "programs" / "cpu-b1-l1.bin"), r"programs is damaged: cpu-b1-l1\.bin is corrupt"),
        (lambda copy: (copy / "programs" / "cpu-b1-l1.bin").unlink(), r"cpu-b1-l1\.bin is missing"),
        (lambda copy: _flip(copy / "programs" / "manifest.json"), r"manifest\.json is corrupt"),
        (lambda copy: shutil.rmtree(copy / "programs"), "has no programs; `efla export` writes them"),
        (lambda copy: _flip(copy / "model.safetensors"), r"model\.safetensors is damaged"),
        (_other_parameters, "was exported with other parameters"),
    ],
)
def test_what_is_wrong_with_an_artifact_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(InferenceError, match=message):
        load_artifact(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(platforms=["cpu", "cude"]), "it must be some of cpu, cuda, tpu; did you mean 'cuda'?"),
        (dict(platforms=[]), r"platforms is \[\]"),
        (dict(batch_sizes=[]), r"batch_sizes is \[\]; it must be ascending numbers, each at least 1"),
        (dict(batch_sizes=[4, 1]), r"batch_sizes is \[4, 1\]"),
        (dict(implementations={"cuda": "palas_gpu"}), "'palas_gpu'; it must be one of .*did you mean 'pallas_gpu'"),
        (dict(platforms=["cpu"], implementations={"cuda": "xla"}), "names 'cuda', which is not among cpu"),
        (dict(batch_sizes=[0, 1]), r"batch_sizes is \[0, 1\]"),
        (dict(lengths=[1, 4, 4]), r"lengths is \[1, 4, 4\]"),
        (dict(lengths=[2, 4]), r"lengths is \[2, 4\]; the first must be 1, for decoding"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(InferenceError, match=message):
        export_model(tmp_path / "model", HYBRID, parameters(HYBRID), load_tokenizer("bytes"), **options)
    assert not list(tmp_path.iterdir())


def test_output_that_is_there_is_refused(artifact):
    with pytest.raises(InferenceError, match="which is there already"):
        export_model(artifact, HYBRID, parameters(HYBRID), load_tokenizer("bytes"))
    load_artifact(artifact)


def test_the_command_prints_the_same_text_from_workdir_and_artifact(tmp_path, capsys):
    workdir = tmp_path / "run"
    save_run(workdir, Config(model=ENDLESS), parameters(ENDLESS))
    keep_tokenizer(workdir, load_tokenizer("bytes"))
    sizes = ["--platforms=cpu", "--batch_sizes=1", "--lengths=1,8"]
    main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'model'}", *sizes])
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    options = ["--prompt=def g(", "--max_new_tokens=12", "--temperature=0.7", "--seed=3"]
    printed = []
    for place in (f"--workdir={workdir}", f"--artifact={tmp_path / 'model'}", f"--workdir={tmp_path / 'model'}"):
        main(["generate", place, *options])
        printed.append(capsys.readouterr().out)
    assert len(printed[0]) > 1
    assert printed == [printed[0]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--platforms=gpu"], "platforms is ['gpu']; it must be some of cpu, cuda, tpu"),
        (["--lengths=1,b"], "--lengths is 'b'; it must be an integer"),
        (["--format=flax"], "--format is 'flax'; it must be programs or fla; did you mean 'fla'?"),
        (["--format=fla", "--lengths=1"], "--lengths and --implementations are of programs"),
        (["--format=fla"], "fla has no such model: the linear mixers are gated_efla"),
        (["--length=1"], "unknown option '--length=1'; did you mean '--lengths'?"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(artifact, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main(["export", f"--workdir={artifact}", f"--output={tmp_path / 'out'}", *options])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())
