#!/usr/bin/env bash
# Makes .venv: Python 3.12 or newer, every package of requirements.lock checked by hash, and this
# project, editable. Returns at once when that was finished before for this very lock,
# pyproject.toml and folder; an interrupted set-up is started anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
python=$venv/bin/python
stamp=$venv/setup-stamp

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

# By running it: a pyenv shim can exist and fail, and Debian can leave out ensurepip.
# The upper bound is the lock's: some of its packages have no wheels for Python 3.15.
serves() {
    "$1" -c 'import ensurepip, sys; sys.exit(not (3, 12) <= sys.version_info < (3, 15))' \
        </dev/null >/dev/null 2>&1
}

find_python() {
    local candidate
    while IFS= read -r candidate; do
        if serves "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done < <(type -ap python3.12 python3 python)
    return 1
}

create_venv() {
    local base
    rm -rf "$venv"
    mkdir "$venv"
    echo incomplete >"$stamp"
    if base=$(find_python); then
        say "creating $venv with $base"
        "$base" -m venv "$venv"
    elif type uv >/dev/null 2>&1 && uv venv --quiet --seed --allow-existing --python 3.12 "$venv"; then
        say "created $venv with uv"
    else
        rm -rf "$venv"
        fail "no Python >= 3.12 (up to 3.14, with ensurepip) found as python3.12, python3 or python
  on PATH, and no uv on PATH could provide one. Install either
    - Python 3.12: python.org, your system's packages (on Debian with python3.12-venv), or
      'pyenv install 3.12'; or
    - uv, which fetches Python itself: https://docs.astral.sh/uv
  and run make again."
    fi
}

pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

install_lock() {
    local locked=(--require-hashes --requirement requirements.lock)
    say "installing requirements.lock"
    if pip_install uv && "$venv/bin/uv" pip install --quiet --python "$python" "${locked[@]}"; then
        return 0
    fi
    say "uv could not; installing with pip, which takes minutes"
    pip_install "${locked[@]}" ||
        fail "requirements.lock could not be installed; the reason stands above. If it is the network:
  pip and uv need PyPI, or a mirror named in PIP_INDEX_URL and UV_DEFAULT_INDEX. Then run make again."
}

key=$({ pwd -P && cat requirements.lock pyproject.toml; } | cksum)
done_for=$(cat "$stamp" 2>/dev/null || true)

if [ "$done_for" = incomplete ] || ! serves "$python" || ! "$python" -c 'import pip' 2>/dev/null; then
    create_venv
elif [ "$done_for" = "$key" ]; then
    exit 0
fi
echo incomplete >"$stamp"
install_lock
pip_install --no-deps --no-build-isolation --editable .
echo "$key" >"$stamp"
say "done"
