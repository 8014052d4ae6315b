"""The decode kernel, interpreted, against the float64 recurrence; its lowering for a GPU; the table of block sizes."""

import contextlib
import json
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels.hopper import blocks, decode, variants
from pallas_kernels.hopper.decode import COLUMNS, default_columns
from pallas_kernels.hopper.mosaic import CHUNK
from tests.ops.helpers import on_gpu

SCALE = 0.5


@contextlib.contextmanager
def interpreted():
    """Runs kernels on the CPU and looks for races; on a GPU they just run."""
    if on_gpu():
        yield
        return
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        assert not interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


def draw(batch, length, key_heads, heads, key_dim, value_dim, dtype=jnp.float32, *, tied=False, decay=True):
    """The arguments of `decode`, with ‖k‖² around 1."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape)
    query, key = (jnp.asarray(normal(batch, length, key_heads, key_dim) / key_dim**0.5, dtype) for _ in range(2))
    value = jnp.asarray(normal(batch, length, heads, value_dim), dtype)
    erase, write, decays = (jnp.asarray(rng.uniform(0.2, 1, (batch, length, heads)), jnp.float32) for _ in range(3))
    state = jnp.asarray(normal(batch, heads, key_dim, value_dim), jnp.float32)
    return query, key, value, erase, None if tied else write, -decays if decay else None, state


def recurrence(query, key, value, erase, write, log_decay, state):
    """Output and state by the token loop in float64."""
    write = erase if write is None else write
    log_decay = np.zeros(erase.shape) if log_decay is None else log_decay
    query, key, value, erase, write, log_decay, state = (
        np.asarray(x, np.float64) for x in (query, key, value, erase, write, log_decay, state)
    )
    query, key = (np.repeat(x, value.shape[2] // x.shape[2], 2) for x in (query, key))
    output = np.zeros(value.shape)
    for t in range(value.shape[1]):
        state = np.exp(log_decay[:, t])[..., None, None] * state
        recalled = np.einsum("bhk,bhkv->bhv", key[:, t], state)
        update = write[:, t, :, None] * value[:, t] - erase[:, t, :, None] * recalled
        state = state + key[:, t, ..., None] * update[..., None, :]
        output[:, t] = SCALE * np.einsum("bhk,bhkv->bhv", query[:, t], state)
    return output, state


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def run(inputs, columns=None):
    with interpreted():
        return jax.block_until_ready(jax.jit(lambda *x: decode.decode(*x, scale=SCALE, columns=columns))(*inputs))


def assert_right(inputs, columns=None):
    """Float32 throughout: a few roundings, of a sum over K, and one more of the output in value's type."""
    output, state = run(inputs, columns)
    want_output, want_state = recurrence(*inputs)
    value = inputs[2]
    assert (output.dtype, state.dtype) == (value.dtype, jnp.float32)
    assert error(state, want_state) < 4 * float(jnp.finfo(jnp.float32).eps)
    assert error(output, want_output) < 4 * float(jnp.finfo(jnp.float32).eps) + float(jnp.finfo(value.dtype).eps) / 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_types(dtype):
    assert_right(draw(1, 1, 1, 2, 64, 64, dtype))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
def test_options(tied, decay):
    assert_right(draw(1, 2, 1, 1, 64, 64, tied=tied, decay=decay))


@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(columns):
    """Every width of block; more key rows than value columns and the reverse."""
    assert_right(draw(1, 1, 1, 1, 64, 128), columns)
    if columns <= 64:
        assert_right(draw(1, 1, 1, 1, 192, 64), columns)


def test_value_heads_read_their_key_head():
    assert_right(draw(2, 1, 2, 4, 64, 64))


@pytest.mark.parametrize("length", [1, 2, 3, decode.SHORT])
def test_several_tokens(length):
    assert_right(draw(1, length, 1, 1, 64, 64, jnp.bfloat16))


def test_each_in_its_own_type():
    query, key, value, *rest = draw(1, 1, 1, 1, 64, 64)
    assert_right((query.astype(jnp.bfloat16), key.astype(jnp.float16), value, *rest))


def test_tokens_at_once_are_tokens_one_by_one():
    """Not by one bit do three tokens in the loop differ from three calls."""
    *tokens, state = draw(1, 3, 1, 2, 64, 64)
    output, want = run((*tokens, state))
    for t in range(3):
        one, state = run((*(None if x is None else x[:, t : t + 1] for x in tokens), state))
        np.testing.assert_array_equal(one, output[:, t : t + 1])
    np.testing.assert_array_equal(state, want)


def lowered(batch, length, heads, dim, donate=True):
    shape = jax.ShapeDtypeStruct
    token = lambda *rest: shape((batch, length, heads, *rest), jnp.float32)
    inputs = (token(dim), token(dim), token(dim), token(), None, None, shape((batch, heads, dim, dim), jnp.float32))
    step = jax.jit(lambda *x: decode.decode(*x, scale=1.0), donate_argnums=(6,) if donate else ())
    return step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


def test_state_is_overwritten_in_place():
    """The kernel's second output is its last operand, which is the donated argument: no copy of the state is left."""
    text = lowered(2, 1, 2, 128)
    call = next(line for line in text.splitlines() if "mosaic_gpu" in line)
    assert "output_operand_alias<output_tuple_indices = [1], operand_index = 4, operand_tuple_indices = []>" in call
    assert text.count("tf.aliasing_output") == 1
    assert "tf.aliasing_output = 1" in text.split("tensor<2x2x128x128xf32>")[1].split("tensor<")[0]
    assert "tf.aliasing_output" not in lowered(2, 1, 2, 128, donate=False)


@pytest.mark.parametrize("batch", [1, 70_000])
def test_lowers_for_few_and_many_heads(batch):
    assert "mosaic_gpu" in lowered(batch, 1, 16, 128)


def test_variants_lower():
    """Every width of block, in the loop over tokens and with everything to read."""
    found = [variant for variant in variants() if re.fullmatch(r"decode-.*-tokens16-.*-full", variant[0])]
    assert len(found) == 8
    for _, _, function, arguments in found:
        assert "mosaic_gpu" in jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dtypes", "key_dim", "value_dim", "reason"),
    [
        ((jnp.bfloat16, jnp.float16, jnp.float32), 64, 256, None),
        ((jnp.float32, jnp.float64, jnp.float32), 64, 64, "key is float64"),
        ((jnp.bfloat16,) * 3, 96, 64, "K=96"),
        ((jnp.bfloat16,) * 3, 64, 320, "V=320"),
    ],
    ids=["served", "type", "K", "V"],
)
def test_unsupported(dtypes, key_dim, value_dim, reason):
    got = decode.unsupported(tuple(map(jnp.dtype, dtypes)), key_dim, value_dim)
    assert got is None if reason is None else reason in (got or "")


@pytest.mark.parametrize("key_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("value_dim", [64, 128, 192, 256])
def test_default_columns(key_dim, value_dim):
    """A block's state fits its registers and divides V; it is the smallest only where SMs would else be idle."""
    fit = [c for c in COLUMNS if value_dim % c == 0 and key_dim * c <= decode.ELEMENTS]
    assert all(default_columns(key_dim, value_dim, heads) in fit for heads in (16, 256, 4096))
    assert default_columns(key_dim, value_dim, 1) == min(fit) == 16
    assert default_columns(key_dim, value_dim, 10**6) == max(fit)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of three measured shapes of decoding, and one of a row, in place of the one that ships."""
    row = lambda heads, columns: dict(K=128, V=128, BH=heads, T=1, choice=dict(columns=columns))
    whole = dict(K=128, V=128, BH=16, T=8192, choice=dict(pieces=8))
    decode_rows = dict(provenance={}, rows=[row(16, 16), row(64, 64), row(4096, 32)])
    content = {"a card": dict(decode=decode_rows, both=dict(provenance={}, rows=[whole]))}
    (tmp_path / "blocks.json").write_text(json.dumps(content))
    monkeypatch.setattr(blocks, "PATH", tmp_path / "blocks.json")
    blocks.tables.cache_clear()
    yield
    blocks.tables.cache_clear()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("where", "count"),
    [
        (("both", 128, 128, 16, 8192), 8),
        (("both", 128, 128, 20, 9000), 8),
        (("both", 128, 128, 32, 8192), None),
        (("both", 128, 128, 16, 16384), None),
        (("decode", 128, 128, 16, 1), 16),
        (("decode", 128, 128, 24, 1), 16),
        (("decode", 128, 128, 40, 1), 64),
        (("decode", 128, 128, 8192, 4), 32),
        (("decode", 128, 128, 300, 1), None),
        (("decode", 128, 128, 16, 5), None),
        (("decode", 128, 64, 16, 1), None),
        (("forward", 128, 128, 16, 1), None),
    ],
    ids=str,
)
def test_nearest_measured_shape(where, count):
    assert list(blocks.lookup(*where, device="a card").values()) == ([] if count is None else [count])
    assert blocks.lookup(*where, device="another card") == {}


@pytest.mark.usefixtures("table")
def test_the_table_is_heeded(monkeypatch):
    """The measured width is the one that is launched."""
    grid = lambda: lowered(1, 1, 16, 128)
    default = grid()
    monkeypatch.setattr(blocks, "lookup", lambda *_: dict(columns=64))
    assert grid() != default


def test_the_table_that_ships():
    """Every row names a choice that the kernel takes, and every device where its rows come from."""
    for directions in blocks.tables().values():
        for direction, table in directions.items():
            assert {"device", "driver", "date", "commit", "versions"} <= set(table["provenance"])
            for row in table["rows"]:
                assert set(row) == {"K", "V", "BH", "T", "choice"}
                if direction == "decode":
                    columns = row["choice"]["columns"]
                    assert columns in COLUMNS
                    assert row["V"] % columns == 0
                    assert row["K"] * columns <= decode.ELEMENTS
                else:
                    assert direction in ("forward", "both")
                    (count,) = row["choice"].values()
                    assert set(row["choice"]) <= {"pieces", "apart"}
                    assert 1 <= count <= row["T"] // CHUNK
