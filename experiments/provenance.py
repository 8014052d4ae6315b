"""What a reader needs to run an experiment again: command, hardware, date, commit, versions."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import jax


def provenance(command: str, commit: str | None = None) -> dict[str, str]:
    """What a reader needs to run it again."""
    device = jax.devices()[0]
    if commit is None:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        described = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        commit = described.stdout.strip() or "unknown"
    return {
        "command": command,
        "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores, {_processor()}",
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
