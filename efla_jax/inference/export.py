"""Export of a model as compiled programs: a model folder and, in it, prefill and decoding as StableHLO.

DIR/                         a model folder, see `folder.py`
DIR/programs/manifest.json   what the programs are, and the sha256 of each
DIR/programs/cpu-b1-l64.bin  `jax.export`'s form of `Programs.forward` for a platform, batch size and length

The programs take the parameters as an argument. They run where no code of the model is: JAX alone reads them.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efla_jax.choices import nearest
from efla_jax.data.text.tokenizers import Tokenizer
from efla_jax.inference import InferenceError, folder
from efla_jax.inference.programs import Cache, cache_form, jit_decode, make_decode, make_forward, zeros
from efla_jax.inference.sampling import Rows
from efla_jax.inference.text import TextModel
from efla_jax.models import LanguageModelConfig
from efla_jax.ops.registry import NAMES
from efla_jax.training import manifest
from efla_jax.training.sharding import leaf_name

# The op's implementation on each platform that programs are exported for, unless another is asked for. It is named,
# not chosen: the choice would be that of the machine that exports. For cuda one that runs on every GPU.
IMPLEMENTATIONS = {"cpu": "xla", "cuda": "xla", "tpu": "xla"}
PLATFORMS = tuple(IMPLEMENTATIONS)
BATCH_SIZES, LENGTHS = (1, 4), (1, 64, 512)
_PROGRAMS = "programs"


def _file_name(platform: str, batch: int, length: int) -> str:
    return f"{platform}-b{batch}-l{length}.bin"


def _check_implementations(platforms: Sequence[str], implementations: Mapping[str, str]) -> None:
    for platform, name in implementations.items():
        if platform not in platforms:
            raise InferenceError(f"implementations names {platform!r}, which is not among {', '.join(platforms)}")
        if name not in NAMES:
            raise InferenceError(
                f"implementations[{platform!r}] is {name!r}; it must be one of {', '.join(NAMES)}{nearest(name, NAMES)}"
            )


def _check(platforms: Sequence[str], batch_sizes: Sequence[int], lengths: Sequence[int]) -> None:
    if not platforms or not set(platforms) <= set(PLATFORMS):
        unknown = next((name for name in platforms if name not in PLATFORMS), "")
        hint = nearest(unknown, PLATFORMS)
        raise InferenceError(f"platforms is {list(platforms)}; it must be some of {', '.join(PLATFORMS)}{hint}")
    for name, sizes in (("batch_sizes", batch_sizes), ("lengths", lengths)):
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise InferenceError(f"{name} is {list(sizes)}; it must be ascending numbers, each at least 1")
    if lengths[0] != 1:
        raise InferenceError(f"lengths is {list(lengths)}; the first must be 1, for decoding")


@functools.cache
def _flat_forward(config: LanguageModelConfig, implementation: str) -> Any:
    """`Programs.forward` from parameters by name and the leaves of a cache; one function, traced once a shape."""
    mixer = dataclasses.replace(config.mixer, implementation=implementation)
    forward = make_forward(dataclasses.replace(config, mixer=mixer))
    structure = jax.tree.structure(cache_form(config, 1))

    @jax.jit
    def flat_forward(named, tokens_BL, lengths_B, leaves):
        cache = jax.tree.unflatten(structure, leaves)
        logits_BV, cache = forward(folder.parameters(config, named), tokens_BL, lengths_B, cache)
        return logits_BV, tuple(jax.tree.leaves(cache))

    return flat_forward


def export_program(
    config: LanguageModelConfig, params: Any, platform: str, batch: int, length: int, implementation: str | None = None
) -> jax.export.Exported:
    """`Programs.forward` of one shape for one platform: (parameters by name, tokens, lengths, leaves of the cache).

    params may be arrays or ShapeDtypeStructs. implementation: of the op, None for that of IMPLEMENTATIONS.
    """
    form = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    named = {leaf_name(path): form(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tokens_BL, lengths_B = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, length), (batch,)))
    leaves = tuple(jax.tree.leaves(cache_form(config, batch)))
    forward = _flat_forward(config, implementation or IMPLEMENTATIONS[platform])
    return jax.export.export(forward, platforms=[platform])(named, tokens_BL, lengths_B, leaves)


def export_model(
    path: str | os.PathLike[str],
    config: LanguageModelConfig,
    params: nnx.State,
    tokenizer: Tokenizer,
    *,
    platforms: Sequence[str] = PLATFORMS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    lengths: Sequence[int] = LENGTHS,
    implementations: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder with programs; nothing is at `path` until all of it is.

    implementations: of the op by platform, where it is not to be that of IMPLEMENTATIONS: {"cuda": "pallas_gpu"}
    exports the kernels for Hopper, and the programs then run on no other GPU.

    Raises:
        InferenceError: a platform, batch size, length or implementation that does not fit, or as `folder.new_folder`.
        NotImplementedError: an implementation that cannot serve the model.
    """
    _check(platforms, batch_sizes, lengths)
    _check_implementations(platforms, implementations or {})
    chosen = {platform: IMPLEMENTATIONS[platform] for platform in platforms} | dict(implementations or {})
    with folder.new_folder(path) as new:
        digest = folder.write_model(new, config, params, tokenizer)
        programs = new / _PROGRAMS
        programs.mkdir()
        for platform in platforms:
            for batch in batch_sizes:
                for length in lengths:
                    exported = export_program(config, params, platform, batch, length, chosen[platform])
                    (programs / _file_name(platform, batch, length)).write_bytes(exported.serialize())
        content = dict(
            implementations=chosen,
            batch_sizes=list(batch_sizes),
            lengths=list(lengths),
            parameters=digest,
            jax=jax.__version__,
        )
        manifest.write(programs, content)


class ExportedPrograms:
    """`Programs` from the files of an export, each read and compiled at its first call.

    Its parameters are arrays by name, its cache a tuple of arrays.
    """

    def __init__(self, programs: Path, platform: str, batch_sizes: Sequence[int], lengths: Sequence[int]):
        self.batch_sizes, self.lengths = tuple(batch_sizes), tuple(lengths)
        self._programs, self._platform = programs, platform
        self._exported = functools.cache(self._read)
        self._compiled = functools.cache(lambda *shape: jax.jit(self._exported(*shape).call, donate_argnums=3))
        self._decode = jit_decode(make_decode(self._call))

    def _read(self, batch: int, length: int) -> jax.export.Exported:
        file = self._programs / _file_name(self._platform, batch, length)
        return jax.export.deserialize(bytearray(file.read_bytes()))

    @property
    def vocab_size(self) -> int:
        logits, *_ = self._exported(self.batch_sizes[0], 1).out_avals
        return logits.shape[-1]

    def empty_cache(self, batch: int) -> Cache:
        exported = self._exported(batch, 1)
        (_, _, _, cache), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        return zeros(cache)

    def prepare(self, params: Any, /) -> Any:
        return params  # the programs take them as they were exported

    def forward(self, params: Any, tokens_BL: Any, lengths_B: Any, cache: Cache, /) -> tuple[jax.Array, Cache]:
        return self._compiled(*np.shape(tokens_BL))(params, tokens_BL, lengths_B, cache)

    def decode(
        self, params: Any, rows: Rows, left_B: Any, cache: Cache, /, *, count: int, vocabulary: int, drawing: bool
    ) -> tuple[jax.Array, Rows, Cache]:
        return self._decode(params, rows, left_B, cache, count=count, vocabulary=vocabulary, drawing=drawing)

    def _call(self, params: Any, tokens_BL: Any, lengths_B: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        call: Any = self._exported(*np.shape(tokens_BL)).call
        return call(params, tokens_BL, lengths_B, cache)


def load_artifact(path: str | os.PathLike[str]) -> TextModel:
    """The model of an export, run by its programs for the default backend.

    Raises:
        InferenceError: `path` is no model folder, a file of it is damaged, it has no programs, or none for this
            platform.
    """
    root = Path(path)
    config, tensors, tokenizer, digest = folder.read_model(root)
    folder.check_digest(root, digest)
    programs = root / _PROGRAMS
    if not programs.is_dir():
        raise InferenceError(f"{root} has no programs; `efla export` writes them")
    try:
        content = manifest.read(programs)
        manifest.verify(programs, content)
    except manifest.DamagedError as error:
        raise InferenceError(f"{programs} is damaged: {error}") from error
    if content["parameters"] != digest:
        raise InferenceError(f"{programs} was exported with other parameters than those in {folder.PARAMETERS}")
    platform, there = jax.export.default_export_platform(), content["implementations"]
    if platform not in there:
        raise InferenceError(
            f"{programs} has no programs for {platform}, on which this runs; it has {', '.join(there)}"
        )
    exported = ExportedPrograms(programs, platform, content["batch_sizes"], content["lengths"])
    return TextModel(config, jax.tree.map(jnp.asarray, tensors), tokenizer, exported)
