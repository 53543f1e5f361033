#!/usr/bin/env bash
set -euo pipefail
# Run accelerator.py on a machine that cannot install, from wheels that are carried along.
#
# usage: benchmarks/accelerator.sh --download DIR [EXTRA...]    on a machine with a network
#        benchmarks/accelerator.sh --wheels DIR OPTIONS OF accelerator.py
#
#   benchmarks/accelerator.sh --download wheels 'jax[cuda12]'   # or 'jax[tpu]'; torch and transformers to compare with
#   benchmarks/accelerator.sh --wheels wheels --out runs/h100
#
# The wheels are for the Python, the system and the processor of the machine that downloads: PYTHON names one of the
# version that the other machine has. The environment is made anew in DIR/venv, or where VENV says; of every package DIR
# may hold one version only.
PYTHON="${PYTHON:-python3}"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mode=${1-} wheels=${2-}
if [[ $mode != --download && $mode != --wheels || -z $wheels ]]; then
    sed -n '3,/^PYTHON=/{/^PYTHON=/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
shift 2
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

if [[ $mode == --download ]]; then
    lock=$here/../requirements/demo-$version.txt
    if [[ ! -f $lock ]]; then
        echo "$PYTHON is Python $version, locked are $(cd "$here/../requirements" && echo demo-*.txt): set PYTHON" >&2
        exit 2
    fi
    mkdir -p "$wheels"
    # Not `pip download`: it leaves a package without wheels as sources, which the other machine could not build.
    "$PYTHON" -m pip wheel --quiet --wheel-dir "$wheels" --constraint "$lock" --requirement "$lock" pip "$@"
    "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$here/.."
    du -sh "$wheels"
    exit
fi

pip=$(find "$wheels" -maxdepth 1 -name 'pip-*.whl' 2>/dev/null | head -n 1 || true)
if [[ -z $pip ]]; then
    echo "$wheels: no wheel of pip in it; make the folder with $0 --download $wheels 'jax[cuda12]'" >&2
    exit 2
fi
venv=${VENV:-$wheels/venv}
"$PYTHON" -m venv --clear --without-pip "$venv"
if ! "$venv/bin/python" "$pip/pip" install --quiet --no-index --no-deps "$wheels"/*.whl; then
    echo "$wheels: made for another machine than this one (Python $version on $(uname -m)); set PYTHON, or download" \
        "there with a Python of this version" >&2
    exit 2
fi
exec "$venv/bin/python" "$here/accelerator.py" "$@"
