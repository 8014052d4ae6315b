"""Fixtures of several modules about training."""

import socket

import pytest


@pytest.fixture
def address():
    """Of a port that is free, and stays the same when the processes are started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
