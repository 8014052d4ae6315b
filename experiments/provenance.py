"""What a reader needs to run an experiment again: command, hardware, date, commit, versions."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import jax


def provenance(command: str, commit: str | None = None, device: str | None = None) -> dict[str, str]:
    """What a reader needs to run it again; device names what JAX is not to be asked for, lest it takes its memory."""
    if device is None:
        device = f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform})"
    if commit is None:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        described = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        commit = described.stdout.strip() or "unknown"
    return {
        "command": command,
        "device": f"{device}, {os.cpu_count()} CPU cores, {_processor()}",
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "versions": f"Python {platform.python_version()}, jax {jax.__version__}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
