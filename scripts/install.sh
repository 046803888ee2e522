#!/bin/sh
# Creates .venv and installs mlx-server into it (editable) at the versions of constraints.txt.
#
#   scripts/install.sh [EXTRA ...]    e.g. dev
#
# Adds the extra that brings MLX on this machine by itself; EXTRA=cpu|cuda12|cuda13 overrides
# that choice, PYTHON=/path/to/python3 the interpreter's.
set -eu
cd "$(dirname "$0")/.."

# Whether $1 runs, is new enough and can make virtual environments. A name on PATH proves
# nothing: version managers put shims there for versions that are switched off.
suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

choose_python() {
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.14 python3 python}; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "mlx-server needs Python 3.11 or newer with its venv module, and found none;" \
        "install one (Debian: python3-venv) or name it: make PYTHON=/path/to/python3" >&2
    return 1
}

# The extra that brings MLX: none on a Mac, where the base install has it. An NVIDIA driver
# says in its summary up to which CUDA it goes.
device_extra() {
    [ "$(uname -s)" = Linux ] || return 0
    cuda=$(nvidia-smi 2>/dev/null |
        sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1)
    if [ "${cuda:-0}" -ge 13 ]; then
        echo cuda13
    elif [ "${cuda:-0}" -ge 12 ]; then
        echo cuda12
    else
        echo cpu
    fi
}

if ! suitable .venv/bin/python; then
    python=$(choose_python)
    "$python" -m venv --clear .venv
fi

extras=$(echo "${EXTRA:-$(device_extra)}" "$@" | tr -s ' ' ',' | sed 's/^,//; s/,$//')
target=".${extras:+[$extras]}"
echo "installing mlx-server $target into .venv ($(.venv/bin/python --version)); this takes a minute"
# -qq leaves errors and nothing else: pip's warnings here are about pip.
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-input \
    --constraint constraints.txt --editable "$target"
