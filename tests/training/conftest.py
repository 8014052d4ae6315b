"""Fixtures of several modules about training."""

import socket
import subprocess

import pytest


@pytest.fixture
def address():
    """Of a port that is free, and stays the same when the processes are started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def small_disk():
    """small_disk(path, mebibytes) makes the directory with a file system of its own, and returns it."""
    mounted = []

    def mount(path, mebibytes):
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", path]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)
