#!/usr/bin/env bash
# environment.sh NAME: makes .cache/NAME, a virtual environment of its own beside .venv, from .ci/NAME.lock, every
# package checked by hash. Returns at once when that was finished before for this very lock. Needs .venv: its Python
# and its uv make it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=.ci/$1.lock
venv=.cache/$1
stamp=$venv/setup-stamp

key=$({ pwd -P && cat "$lock"; } | cksum)
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$key" ]; then
    exit 0
fi
printf 'setup: making %s from %s\n' "$venv" "$lock" >&2
rm -rf "$venv"
.venv/bin/python -m venv --without-pip "$venv"
# no configuration: pyproject.toml holds .venv to another JAX
.venv/bin/uv pip install --no-config --quiet --python "$venv/bin/python" --require-hashes --requirement "$lock"
echo "$key" >"$stamp"
