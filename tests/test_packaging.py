"""The lock, the wheel and the set-up script: what stands between a clone and a running project."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def locked() -> dict[NormalizedName, Requirement]:
    """The lock's entries by canonical name; every one checked to be `name==version` and hashes."""
    entries = {}
    lines = "\n".join(line for line in LOCK.splitlines() if not line.lstrip().startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+(?=--hash)", line.strip())
        assert hashes, f"no hash: {line!r}"
        assert all(HASH.fullmatch(item) for item in hashes), f"not only sha256 hashes: {line!r}"
        entry = Requirement(requirement)
        assert [spec.operator for spec in entry.specifier] == ["=="], f"not pinned: {requirement!r}"
        assert entry.url is None, f"names an address: {requirement!r}"
        entries[canonicalize_name(entry.name)] = entry
    return entries


def version(pin: SpecifierSet) -> str:
    (only,) = pin
    return only.version


def test_every_lock_entry_is_pinned_and_hashed():
    assert len(locked()) > len(PROJECT["project"]["dependencies"])


def test_lock_names_no_index():
    address = re.compile(r"\w:/|--(?:extra-)?index|--find-links|--trusted|--constraint|/tmp")
    assert [line for line in LOCK.splitlines() if address.search(line)] == []


def test_lock_holds_jax_at_the_tested_version():
    entries = locked()
    for name in ("jax", "jaxlib"):
        assert version(entries[canonicalize_name(name)].specifier) == "0.11.2"


def test_lock_satisfies_what_pyproject_asks_for():
    groups = (
        PROJECT["project"]["dependencies"],
        PROJECT["dependency-groups"]["dev"],
        PROJECT["build-system"]["requires"],  # the project is installed without build isolation
    )
    pins = {name: entry.specifier for name, entry in locked().items() if entry.marker is None}
    unmet = []
    for wanted in map(Requirement, chain.from_iterable(groups)):
        pin = pins.get(canonicalize_name(wanted.name))
        if pin is None or not wanted.specifier.contains(version(pin)):
            unmet.append(f"{wanted}, locked: {pin}")
    assert not unmet, "requirements.lock is behind pyproject.toml; run make lock"


def build(kind: str, folder: Path) -> zipfile.ZipFile:
    """Builds as an installer does that has no index: with the packages at hand, from the root."""
    code = f"from hatchling.build import build_{kind}; build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def sources(*folders: str) -> set[str]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_wheel_holds_the_library_and_its_configs(tmp_path):
    with build("wheel", tmp_path) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(wheel.read(entry_points).decode())
    code = {name for name in names if ".dist-info/" not in name}
    configs = {f"efla_jax/{name}" for name in sources("configs")}
    assert configs, "configs/ has no config"
    library = sources("efla_jax", "pallas_kernels")
    assert {name for name in code if name.endswith(".py")} == library | configs
    assert "efla_jax/py.typed" in code
    tasks = {path.relative_to(ROOT).as_posix() for path in (ROOT / "efla_jax").rglob("*.yaml")}
    assert {name for name in code if name.endswith(".yaml")} == tasks != set()
    assert {name.split("/")[0] for name in code} == {"efla_jax", "pallas_kernels"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert dict(scripts["console_scripts"]) == {"efla": "efla_jax.cli:main"}
    assert "efla_jax/cli.py" in code


def test_editable_install_copies_nothing(tmp_path):
    """Else edits of configs/ would not reach the library that was installed from this folder."""
    with build("editable", tmp_path) as wheel:
        code = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert code == ["_efla_jax.pth"]
        assert Path(wheel.read(code[0]).decode()) == ROOT


def test_setup_without_python_says_how_to_get_one(tmp_path):
    clone, path = tmp_path / "clone", tmp_path / "bin"
    path.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname", "mkdir", "rm"):
        (path / tool).symlink_to(shutil.which(tool) or tool)
    for shim in ("python3.12", "python3", "python", "uv"):  # as pyenv's, of a version not there
        (path / shim).write_text(f"#!/bin/sh\necho '{shim}: command not found' >&2\nexit 127\n")
        (path / shim).chmod(0o755)
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    for file in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / file, clone)
    done = subprocess.run(
        [path / "bash", ".ci/setup.sh"],
        cwd=clone,
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    for hint in ("Python >= 3.12", "pyenv install 3.12", "uv, which fetches Python"):
        assert hint in done.stderr
    assert not (clone / ".venv").exists()


def test_continuous_integration_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
