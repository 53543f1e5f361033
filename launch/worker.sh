#!/usr/bin/env bash
set -euo pipefail
# The work of every host of a run, called by the other scripts: get the code ready, stage the data, train.
#
# usage: launch/worker.sh [--dry-run | --help] install EXTRAS | stage | train OPTIONS OF pathflip train
#
# install  Python 3.12 and the locked packages in .venv beside launch/, with extras such as tpu, gpu or gpu,gcs
# stage    copy a bucket's data to local disk: only what is missing; the records completely or not at all
# train    `pathflip train` in the folder of the data, so that options name records, texts and tokenizer inside it
#
# Settings, from the environment:
DATA="${DATA:-}"               # gs://... or s3://... with records/, texts, slide table, tokenizer; or a folder, read in place
LOCAL="${LOCAL:-/tmp/pathflip}" # folder on local disk for staged data, and for the run where WORKDIR is a bucket
WORKDIR="${WORKDIR:-}"         # run folder: one that all hosts share; a single process may give a bucket
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder or bucket of compiled programs; empty: compiled/ in the run folder
BACKUP_SECONDS="${BACKUP_SECONDS:-300}" # where WORKDIR is a bucket: seconds between two copies of the run to it
COORDINATOR="${COORDINATOR:-}" # host:port of process 0, with PROCESSES and PROCESS; empty: JAX finds the others, or there are none
PROCESSES="${PROCESSES:-}"     # number of processes
PROCESS="${PROCESS:-}"         # number of this process
WAIT_FOR="${WAIT_FOR:-}"       # host names that must have an address before training starts
WAIT_SECONDS="${WAIT_SECONDS:-3600}" # seconds to wait for these names: a host gets its own when it has staged
LAUNCH_ID="${LAUNCH_ID:-}"     # id of the launch, the same when the launcher starts this host again; empty: starts are not counted
MAX_STARTS="${MAX_STARTS:-5}"  # starts of one launch at one step before giving up; 0: no limit

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
numbers MAX_STARTS
seconds WAIT_SECONDS BACKUP_SECONDS

DATA=${DATA%/} WORKDIR=${WORKDIR%/}
ROOT=${LAUNCH%/launch}
command -v pathflip > /dev/null || PATH=$ROOT/.venv/bin:$PATH

# install EXTRAS: packages that the lock file lacks, the drivers of TPUs and GPUs, are taken as of a fixed date.
install() {
    run python3 -m pip install --user --quiet uv==0.13.9
    run "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 "$ROOT/.venv"
    run "$HOME/.local/bin/uv" pip install --quiet --python "$ROOT/.venv/bin/python" --exclude-newer 2026-11-24 \
        --constraint "$ROOT/requirements/demo-3.12.txt" "${ROOT}[$1]"
}

# download URL FOLDER [SKIP]: mirror the bucket in the folder, except for paths that contain SKIP.
download() {
    case $1 in
        gs://*) run gcloud storage rsync --recursive --delete-unmatched-destination-objects ${3:+"--exclude=.*$3.*"} "$1" "$2" ;;
        s3://*) run aws s3 sync --no-progress --delete ${3:+"--exclude=*$3*"} "$1" "$2" ;;
    esac || return 1 # their exit codes have other meanings than ours
}

# upload FOLDER URL SKIP: add what is new to the bucket. Nothing is deleted there: a run is never lost by a mistake here.
upload() {
    case $2 in
        gs://*) run gcloud storage rsync --recursive "--exclude=.*$3.*" "$1" "$2" ;;
        s3://*) run aws s3 sync --no-progress "--exclude=*$3*" "$1" "$2" ;;
    esac
}

# download_whole URL FOLDER [CHECK]: replace the folder once the copy is complete and has passed CHECK. An interrupted
# copy is continued.
download_whole() {
    run mkdir -p "$2.partial" && download "$1" "$2.partial" && ${3:+"$3" "$2.partial"} && run rm -rf "$2" &&
        run mv "$2.partial" "$2"
}

copy_object() {
    case $1$2 in
        *gs://*) run gcloud storage cp "$1" "$2" ;;
        *s3://*) run aws s3 cp --no-progress "$1" "$2" ;;
    esac
}

# check_records FOLDER: every shard of manifest.json must be there in full size; the bucket itself may be incomplete.
check_records() {
    [[ -z $DRY_RUN ]] || return 0
    python3 - "$1" <<'PY'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for shard in json.loads((folder / "manifest.json").read_bytes())["shards"]:
    path = folder / shard["name"]
    found = path.stat().st_size if path.is_file() else "no file"
    if found != shard["bytes"]:
        sys.exit(f"{path}: found {found}, expected {shard['bytes']} bytes; write the records to the bucket again")
PY
}

# local_folder KIND URL: named by the user and the whole URL: buckets of other labs have a cohort and a base run too.
local_folder() { echo "$LOCAL/pathflip-$1-${2##*/}-$(id -u)-$(printf '%s' "$2" | sha256sum | cut -c1-12)"; }

data_folder() {
    if is_bucket "$DATA"; then local_folder data "$DATA"; else echo "$DATA"; fi
}

# make_local: create LOCAL, in which all users of the host may create folders, as in /tmp.
make_local() {
    [[ -n $DRY_RUN || -d $LOCAL ]] || { mkdir -p "$LOCAL" && chmod 1777 "$LOCAL"; }
    [[ -n $DRY_RUN || -w $LOCAL ]] || fail "LOCAL=$LOCAL: $(id -un 2> /dev/null || id -u) may not write there; set LOCAL to another folder"
}

stage() {
    local folder records
    is_bucket "$DATA" || { say "$DATA is read in place"; return; }
    folder=$(data_folder) records=$folder/records
    make_local
    run mkdir -p "$folder"
    if [[ -z $DRY_RUN ]]; then
        exec 9> "$folder.lock"
        # Processes of one host stage one after the other; the second finds it done.
        flock --nonblock 9 || { say "waiting for another process that stages to $folder"; flock 9; }
    fi
    copy_object "$DATA/records/manifest.json" "$folder.manifest" ||
        fail "$DATA/records/manifest.json cannot be read: the records are incomplete, or this host has no permission to read them"
    if [[ -z $DRY_RUN ]] && cmp -s "$folder.manifest" "$records/manifest.json"; then
        say "$records is staged"
    else
        if [[ -z $DRY_RUN && -d $records ]]; then
            exec 8> "$folder.used"
            flock --nonblock 8 || fail "$DATA/records has changed, and a run on this host still reads the earlier copy: end that run, or set another LOCAL"
        fi
        download_whole "$DATA/records" "$records" check_records
    fi
    download "$DATA" "$folder" records/ # texts and tables change more often than features, and are small
}

# train_here WORKDIR OPTIONS...: the process of this host, in the folder of the data.
train_here() {
    local workdir=$1
    shift
    export JAX_COMPILATION_CACHE_DIR="${COMPILATION_CACHE:-$workdir/compiled}"
    [[ -z $COORDINATOR ]] || set -- "$@" --coordinator "$COORDINATOR" --num_processes "$PROCESSES" --process_id "$PROCESS"
    if [[ -n $DRY_RUN ]]; then
        quoted cd "$(data_folder)"
        echo "$(assignments JAX_COMPILATION_CACHE_DIR) $(quoted pathflip train "$@" --workdir "$workdir")"
    else
        cd "$(data_folder)" || fail "$(data_folder): no such folder; run \`$0 stage\` first"
        if is_bucket "$DATA"; then # locked until the process ends, so that the data that it reads is not replaced
            exec 8> "$(data_folder).used"
            flock --shared 8
        fi
        exec pathflip train "$@" --workdir "$workdir"
    fi
}

# train_with_backup OPTIONS...: train on local disk: fetch the run from the bucket, copy it back regularly and at the end.
train_with_backup() {
    local folder code=0 trainer backup unfinished=orbax-checkpoint-tmp
    folder=$(local_folder run "$WORKDIR")
    make_local
    if [[ -z $DRY_RUN ]]; then
        exec 7> "$folder.used" # the trainer has it open too, and may outlive this script
        flock --wait 10 7 || fail "$folder, the copy of $WORKDIR on this host, is in use by another process: end that, or set another LOCAL"
    fi
    # The holder is the host that fetched the run last: its copy is the newest, unless another host has continued the run.
    run rm -f "$folder.holder"
    copy_object "$WORKDIR/holder" "$folder.holder" || say "$WORKDIR: a new run"
    if [[ -n $DRY_RUN ]] || ! cmp -s "$folder.holder" "$folder/holder"; then
        run rm -rf "$folder"
        # With a file in it, the folder exists in the bucket: a failed copy is then a failure, and never taken for a new run.
        copy_object - "$WORKDIR/holder" <<< "$(uname -n) $(date +%s.%N)"
        download_whole "$WORKDIR" "$folder"
    fi
    count_start "$folder" "$(process_name)"
    if [[ -n $DRY_RUN ]]; then
        train_here "$folder" "$@"
        upload "$folder" "$WORKDIR" "$unfinished"
        return
    fi
    train_here "$folder" "$@" &
    trainer=$!
    trap 'kill -TERM "$trainer"' TERM INT HUP
    while sleep "$BACKUP_SECONDS" > /dev/null 2>&1; do
        upload "$folder" "$WORKDIR" "$unfinished" > /dev/null 2>&1 || say "$WORKDIR: this copy of the run failed; the next follows in $BACKUP_SECONDS s"
    done 7>&- &
    backup=$!
    wait "$trainer" || code=$?
    while kill -0 "$trainer" 2> /dev/null; do # a trap ends `wait` before the process ends
        code=0
        wait "$trainer" || code=$?
    done
    kill "$backup"
    upload "$folder" "$WORKDIR" "$unfinished" || { say "the last copy to $WORKDIR failed: the run is incomplete there, and complete in $folder"; return 1; }
    return "$code"
}

process_name() { echo "${PROCESS:-${SLURM_PROCID:-$(uname -n)}}"; }

# wait_for_hosts: a host has an address once it has staged; the others wait here, not in a connection that times out.
wait_for_hosts() {
    local host told=
    SECONDS=0
    for host in $WAIT_FOR; do
        if [[ -n $DRY_RUN ]]; then
            quoted getent hosts "$host"
            continue
        fi
        until getent hosts "$host" > /dev/null; do
            ((SECONDS < ${WAIT_SECONDS%.*})) || {
                say "$host has no address after $WAIT_SECONDS s: it did not start, or is still staging"
                exit "$TRY_AGAIN"
            }
            if ((SECONDS >= 10)) && [[ $told != "$host" ]]; then
                say "waiting for $host, which has no address yet; $WAIT_SECONDS s at most"
                told=$host
            fi
            sleep 1
        done
    done
}

case ${OPTIONS[0]-} in
    install) install "${OPTIONS[1]:?expected extras, such as tpu or gpu}" ;;
    stage)
        need DATA
        stage
        ;;
    train)
        OPTIONS=("${OPTIONS[@]:1}")
        need DATA WORKDIR
        need_training
        is_bucket "$WORKDIR" || count_start "$WORKDIR" "$(process_name)"
        wait_for_hosts
        if is_bucket "$WORKDIR"; then
            train_with_backup "${OPTIONS[@]}"
        else
            train_here "$WORKDIR" "${OPTIONS[@]}"
        fi
        ;;
    *) fail "${OPTIONS[0]-nothing}: expected install, stage or train" ;;
esac; exit # on one line, which bash has read: this file may be edited during a run of days
