#!/bin/sh
# Creates .venv and installs mlx-server into it (editable) at the versions of constraints.txt.
#
#   scripts/install.sh [EXTRA ...]    e.g. dev
#
# Adds the extra that brings MLX on this machine by itself, and that of the web page;
# EXTRA=cpu|cuda12|cuda13 overrides the former, PYTHON=/path/to/python3 the interpreter's choice.
set -eu
cd "$(dirname "$0")/.."

give_up() {
    echo "$*" >&2
    exit 1
}

# MLX's wheels for a Mac are for Apple silicon and macOS 14 or newer. The shell itself may run
# under Rosetta, where uname names the wrong processor.
check_mac() {
    [ "$(sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ] ||
        give_up "MLX needs a Mac with Apple silicon; this one has an Intel processor"
    version=$(sw_vers -productVersion)
    [ "${version%%.*}" -ge 14 ] ||
        give_up "MLX needs macOS 14 or newer, and this is macOS $version: update it first"
}

# Whether $1 runs, is new enough, can make virtual environments and, on a Mac, is no Intel build
# under Rosetta. A name on PATH proves nothing: version managers put shims there for versions
# that are switched off.
suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 &&
        ! translated "$1"
}

translated() {
    [ "$(uname -s)" = Darwin ] &&
        "$1" -c 'import platform, sys; sys.exit(platform.machine() == "arm64")' 2>/dev/null
}

choose_python() {
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.14 python3 python}; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
        if translated "$candidate"; then
            rosetta="$candidate"
        fi
    done
    [ -z "${rosetta-}" ] ||
        give_up "$rosetta is a Python for Intel processors, which runs under Rosetta and cannot" \
            "use MLX; install one for Apple silicon (python.org's, or Homebrew's in" \
            "/opt/homebrew) or name it: make PYTHON=/path/to/python3"
    give_up "mlx-server needs Python 3.11 or newer with its venv module, and found none;" \
        "install one (Debian: python3-venv) or name it: make PYTHON=/path/to/python3"
}

# The extra that brings MLX: none on a Mac, where the base install has it. An NVIDIA driver
# says in its summary up to which CUDA it goes; MLX asks for 550.54.14, of CUDA 12.4, or newer.
device_extra() {
    [ "$(uname -s)" = Linux ] || return 0
    summary=$(nvidia-smi 2>/dev/null) || summary=
    cuda=$(echo "$summary" |
        sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9]*\)\.\([0-9][0-9]*\).*/\1 \2/p' | head -n 1)
    # shellcheck disable=SC2086
    set -- ${cuda:-0 0}
    if [ "$1" -ge 13 ]; then
        echo cuda13
    elif [ "$1" -eq 12 ] && [ "$2" -ge 4 ]; then
        echo cuda12
    else
        [ -z "$cuda" ] ||
            echo "This NVIDIA driver knows CUDA up to $1.$2, and MLX needs 12.4" \
                "(driver 550.54.14 or newer): installing for the CPU. Update the driver and" \
                "run make again, or try it all the same with make EXTRA=cuda12" >&2
        echo cpu
    fi
}

[ "$(uname -s)" != Darwin ] || check_mac

if ! suitable .venv/bin/python; then
    python=$(choose_python)
    "$python" -m venv --clear .venv
fi

extras=$(echo "${EXTRA:-$(device_extra)}" ui "$@" | tr -s ' ' ',' | sed 's/^,//; s/,$//')
target=".${extras:+[$extras]}"
echo "installing mlx-server $target into .venv ($(.venv/bin/python --version)); this takes a minute"
# -qq leaves errors and nothing else: pip's warnings here are about pip.
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-input \
    --constraint constraints.txt --editable "$target"
