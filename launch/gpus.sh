#!/usr/bin/env bash
set -euo pipefail
# Train on one node with several GPUs: one process a GPU, started again together when one stops or is lost.
#
# usage: launch/gpus.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   DATA=gs://lab/cohort WORKDIR=runs/base launch/gpus.sh --config align_base --config.data.records=records ...
#
# SIGTERM and ctrl-C reach the processes, which save; then this script ends with their exit code, 75.
#
# Settings, here or in the environment:
GPUS="${GPUS:-}"       # how many; empty: all of nvidia-smi
DATA="${DATA:-}"       # gs://... or s3://... with records/, texts, slide table, tokenizer; or a folder: read in place
WORKDIR="${WORKDIR:-}" # run folder
LOCAL="${LOCAL:-/tmp/pathflip}" # local disk, for what comes from a bucket
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
PORT="${PORT:-8476}"   # where the processes meet
MAX_RESTARTS="${MAX_RESTARTS:-20}" # after failures; a stop after saving is none
PAUSE="${PAUSE:-10}"   # seconds before starting again after a failure
WAIT="${WAIT:-120}"    # seconds that the other processes have to end, after the first

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
need DATA WORKDIR
need_training
! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the processes write one checkpoint together, so give a folder"
WORKDIR=$(realpath -m "$WORKDIR")
is_bucket "$DATA" || DATA=$(realpath -m "$DATA")
[[ -n $GPUS ]] || GPUS=$(nvidia-smi --list-gpus 2> /dev/null | grep -c ^GPU || true)
[[ $GPUS -gt 0 ]] || fail "nvidia-smi shows no GPU: set GPUS, how many processes to start"

export DATA WORKDIR LOCAL COMPILATION_CACHE
PIDS=()

all_run() {
    local pid
    for pid in "${PIDS[@]}"; do kill -0 "$pid" 2> /dev/null || return; done
}

# start NUMBER: the process of one GPU.
start() {
    local command=(env CUDA_VISIBLE_DEVICES="$1" COORDINATOR="localhost:$PORT" PROCESSES="$GPUS" PROCESS="$1"
        "$LAUNCH/worker.sh" train "${OPTIONS[@]}")
    if [[ -n $DRY_RUN ]]; then
        echo "$(quoted "${command[@]}") &"
    else
        "${command[@]}" &
        PIDS+=($!)
    fi
}

# attempt: all processes from start to end; the largest of their exit codes.
attempt() {
    local number pid reaper code=0 status
    PIDS=()
    for ((number = 0; number < GPUS; number++)); do start "$number"; done
    [[ -z $DRY_RUN ]] || return 0
    while all_run; do sleep 1; done
    # The others are on their last step too, or wait for the lost one without end.
    (sleep "$WAIT" && kill -KILL "${PIDS[@]}") > /dev/null 2>&1 &
    reaper=$!
    for pid in "${PIDS[@]}"; do
        status=0
        wait "$pid" || status=$?
        while kill -0 "$pid" 2> /dev/null; do # a trap ends `wait` before the process ends
            status=0
            wait "$pid" || status=$?
        done
        ((status <= code)) || code=$status
    done
    kill "$reaper" 2> /dev/null || true
    return "$code"
}

trap 'STOPPING=1; kill -TERM "${PIDS[@]}" 2> /dev/null || true' TERM INT HUP
keep_running run "$LAUNCH/worker.sh" stage
keep_running attempt; show_worker; exit # one line, read whole: this file may change while it runs for days
