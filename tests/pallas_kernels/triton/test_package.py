"""What of the Triton kernels needs no Triton: which calls they decline, their tiles, that nothing imports it early."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from pallas_kernels import triton as kernels
from pallas_kernels.triton.tiling import DTYPES, KEY_DIMS, VALUE_DIMS, tiles

FOLDER = Path(kernels.__file__).parent


def test_import_is_lazy():
    code = "import sys, pallas_kernels.triton; print(sorted({'triton', 'jax_triton', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_stay_inside():
    """jax, Triton and the standard library, never efla_jax or NumPy."""
    allowed = {"jax", "triton", "jax_triton", *sys.stdlib_module_names}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            astray = [x for x in names if not x.startswith("pallas_kernels.triton") and x.split(".")[0] not in allowed]
            assert not astray, f"{path.name} imports {astray}"


def test_no_module_hides_a_function():
    """Importing a submodule binds its name in the package, over a function of that name."""
    assert not {path.stem for path in FOLDER.glob("*.py")} & set(kernels.__all__)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (dict(dtypes=("float32",) * 3), "float32, float32, float32"),
        (dict(dtypes=("bfloat16", "float16", "bfloat16")), "bfloat16, float16, bfloat16"),
        (dict(key_dim=60), "K is 60"),
        (dict(key_dim=256), "K is 256"),
        (dict(value_dim=8), "V is 8"),
        (dict(chunk_size=32), "chunk_size=32"),
    ],
)
def test_unsupported(sizes, reason):
    call = dict(dtypes=("bfloat16",) * 3, key_dim=64, value_dim=64, chunk_size=None)
    assert kernels.unsupported(**call) is None
    found = kernels.unsupported(**call | sizes)
    assert found is not None
    assert reason in found


def test_serves_every_listed_size():
    for key_dim, value_dim, dtype in itertools.product(KEY_DIMS, VALUE_DIMS, DTYPES):
        assert kernels.unsupported((jnp.dtype(dtype),) * 3, key_dim, value_dim, 64) is None


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_divide(capability, itemsize):
    """Programs share K and V out without a rest, and no side of a product is below the 16 that tensor cores need."""
    for key_dim, value_dim, grouped in itertools.product(KEY_DIMS, VALUE_DIMS, (False, True)):
        for tile in tiles(capability, itemsize, key_dim, value_dim, grouped):
            assert key_dim % tile.key_columns == 0
            assert value_dim % tile.columns == 0
            assert min(tile.key_columns, tile.columns) >= 16
            assert tile.warps in (4, 8)
