"""The environments beside .venv: their locks, and the script that makes one from its lock."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NAMES = ("gpu-compile", "tpu-compile", "jax-next")


def entries(path: Path) -> dict[str, str]:
    """Version by name; every entry checked to be `name==version` and hashes."""
    lines = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    found = {}
    for line in lines.replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+(?=--hash)", line.strip())
        assert hashes, f"no hash: {line!r}"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", item) for item in hashes), line
        entry = Requirement(requirement)
        (pin,) = entry.specifier
        assert pin.operator == "==", line
        assert entry.url is None, line
        found[entry.name] = pin.version
    return found


def wanted(name: str) -> list[Requirement]:
    lines = (ROOT / ".ci" / f"{name}.in").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", NAMES)
def test_lock_holds_what_is_asked_for_and_no_address(name):
    lock = ROOT / ".ci" / f"{name}.lock"
    pins = entries(lock)
    for requirement in wanted(name):
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement}: run make lock"
    address = re.compile(r"\w:/|--(?:extra-)?index|--find-links|--trusted|--constraint|/tmp")
    assert [line for line in lock.read_text().splitlines() if address.search(line)] == []


def test_kernels_are_compiled_by_the_jax_they_are_tested_with():
    tested, compiling = entries(ROOT / "requirements.lock"), entries(ROOT / ".ci" / "gpu-compile.lock")
    versions = {compiling[name] for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")}
    compiling = entries(ROOT / ".ci" / "tpu-compile.lock")
    assert versions | {compiling["jax"], compiling["jaxlib"]} == {tested["jax"]}


def test_next_jax_is_another_in_the_supported_range():
    jax = entries(ROOT / ".ci" / "jax-next.lock")["jax"]
    assert Requirement("jax>=0.12,<0.13").specifier.contains(jax)


@pytest.fixture
def project(tmp_path):
    """A copy whose Python makes empty folders and whose uv takes note of its arguments, or fails if told to."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "environment.sh", tmp_path / ".ci")
    (tmp_path / ".ci" / "some.lock").write_text("package==1\n")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for tool, script in (
        ("python", 'for last; do :; done; mkdir -p "$last/bin"'),
        ("uv", 'echo "$@" >>uv-calls; test ! -e uv-fails'),
    ):
        (tools / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tools / tool).chmod(0o755)
    return tmp_path


def make_environment(project):
    done = subprocess.run(["bash", ".ci/environment.sh", "some"], cwd=project, capture_output=True, text=True)
    calls = project / "uv-calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_environment_is_made_once_for_a_lock(project):
    status, calls = make_environment(project)
    assert status == 0
    assert len(calls) == 1
    for part in ("--require-hashes", "--requirement .ci/some.lock", "--python .cache/some/bin/python"):
        assert part in calls[0]
    assert make_environment(project) == (0, calls)


def test_environment_is_made_anew_for_another_lock(project):
    make_environment(project)
    left = project / ".cache" / "some" / "left"
    left.touch()
    (project / ".ci" / "some.lock").write_text("package==2\n")
    status, calls = make_environment(project)
    assert (status, len(calls), left.exists()) == (0, 2, False)


def test_environment_that_was_not_finished_is_made_anew(project):
    fails = project / "uv-fails"
    fails.touch()
    assert make_environment(project)[0] != 0
    fails.unlink()
    status, calls = make_environment(project)
    assert (status, len(calls)) == (0, 2)
