#!/usr/bin/env bash
# Make the Python environment this project runs in, once; later calls return at once.
#
#   bash scripts/setup.sh [EXTRA...]     EXTRA: app, deepspeed, dev, eval, exr, gpu, train, vision (see pyproject.toml)
#
# An environment that is already active (venv or conda) is used; otherwise .venv/ is made in the project's folder.
# JOINTDIT_TORCH_INDEX  package index to take torch from, for example https://download.pytorch.org/whl/cpu
# JOINTDIT_PYTHON       Python to make .venv with (default: the first of python3.11 python3.12 python3 that works)
#
# The other scripts source this file and call `jointdit_setup`; then `python` is the environment's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jointdit_fail() {
    echo "scripts/setup.sh: $*" >&2
    exit 2
}

jointdit_find_python() {
    local candidate
    for candidate in ${JOINTDIT_PYTHON:+"$JOINTDIT_PYTHON"} python3.11 python3.12 python3; do
        # A name on the PATH need not run (version managers leave such names), and need not be new enough.
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        [ "$candidate" != "${JOINTDIT_PYTHON:-}" ] || jointdit_fail "JOINTDIT_PYTHON=$candidate: does not run, is older than 3.11 or has no venv module"
    done
    jointdit_fail "no Python 3.11 or newer with the venv module found; install one (Debian, Ubuntu: apt install python3 python3-venv) or name it with JOINTDIT_PYTHON"
}

jointdit_enter_environment() {
    if [ -n "${VIRTUAL_ENV:-}" ] || { [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; }; then
        python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            jointdit_fail "${VIRTUAL_ENV:-$CONDA_PREFIX}: the active environment's Python is older than 3.11; deactivate it and call again"
        return
    fi
    if ! [ -x .venv/bin/python ]; then
        local base
        base=$(jointdit_find_python)
        echo "Making .venv with $("$base" --version) ($base)"
        "$base" -m venv .venv || jointdit_fail ".venv: could not be made; remove the folder and call again"
    fi
    VIRTUAL_ENV=$PWD/.venv
    PATH=$VIRTUAL_ENV/bin:$PATH
    export VIRTUAL_ENV PATH
}

jointdit_say_download() {
    local torch
    torch=$(grep '^torch==' requirements.txt)
    echo "Installing requirements.txt ($torch and what goes with it) from the package index. To download, about:"
    if [ -n "${JOINTDIT_TORCH_INDEX:-}" ]; then
        echo "  torch from $JOINTDIT_TORCH_INDEX: 0.2 GB for a CPU build, 3 GB for a CUDA build"
    elif [ "$(uname -s)" = Linux ]; then
        echo "  torch: 3 GB with its CUDA libraries, 8 GB on disk (0.2 GB where pip is set up to find a CPU build)"
        command -v nvidia-smi >/dev/null 2>&1 ||
            echo "  No NVIDIA GPU here? JOINTDIT_TORCH_INDEX=https://download.pytorch.org/whl/cpu bash scripts/setup.sh takes 0.2 GB instead"
    else
        echo "  torch: 0.1 to 0.2 GB"
    fi
    echo "  everything else: 0.1 GB. No model weights: the embedded model is part of the repository"
}

jointdit_setup() {
    local extras folder stamp hash
    extras=$(IFS=,; echo "$*")
    jointdit_enter_environment
    folder=${VIRTUAL_ENV:-$CONDA_PREFIX}
    # The folder's name is part of the hash: an editable install in a moved environment must be made anew.
    hash=$({ cat requirements.txt pyproject.toml; echo "$PWD ${JOINTDIT_TORCH_INDEX:-}"; } | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    stamp=$folder/.jointdit-${extras:-base}.stamp
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$hash" ]; then
        return
    fi
    jointdit_say_download
    if [ -n "${JOINTDIT_TORCH_INDEX:-}" ]; then
        python -m pip install --disable-pip-version-check --index-url "$JOINTDIT_TORCH_INDEX" "$(grep '^torch==' requirements.txt)" ||
            jointdit_fail "JOINTDIT_TORCH_INDEX=$JOINTDIT_TORCH_INDEX: torch could not be installed from there; see pip's message above"
    fi
    # One call for all: pip then chooses the extras' own requirements so that they fit the pins.
    python -m pip install --disable-pip-version-check -r requirements.txt ${extras:+-e ".[$extras]"} ||
        jointdit_fail "requirements.txt: pip could not install it; see its message above"
    echo "$hash" | tee "$stamp" >"$folder/.jointdit-base.stamp" # any set of extras holds the base
    echo "Installed into $folder"
}

# Not when sourced: the caller's own arguments would be taken for extras.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    jointdit_setup "$@"
fi
