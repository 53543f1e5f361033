#!/usr/bin/env bash
set -euo pipefail
# Train on one node with several GPUs: one process per GPU, all started again when one stops or is lost.
#
# usage: launch/gpus.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   DATA=gs://lab/cohort WORKDIR=runs/base launch/gpus.sh --config align_base --config.data.records=records ...
#
# The GPUs are those in CUDA_VISIBLE_DEVICES: numbers, or UUIDs of GPUs and of MIG devices (in HIP_VISIBLE_DEVICES or
# ROCR_VISIBLE_DEVICES where it is not set); without these variables, those that nvidia-smi lists.
#
# SIGTERM, SIGHUP and ctrl-C are passed to the processes, which save a checkpoint; then this script ends with their exit
# code, 75.
#
# Settings, here or in the environment:
GPUS="${GPUS:-all}"    # how many of these GPUs to use, or all
DATA="${DATA:-}"       # gs://... or s3://... with records/, texts, slide table, tokenizer; or a folder, read in place
WORKDIR="${WORKDIR:-}" # run folder
LOCAL="${LOCAL:-/tmp/pathflip}" # folder on local disk for data from a bucket
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
PORT="${PORT:-8476}"   # at which the processes connect to each other
MAX_RESTARTS="${MAX_RESTARTS:-20}" # restarts after failures; a stop after saving does not count
PAUSE="${PAUSE:-10}"   # seconds before starting again after a failure
MAX_STARTS="${MAX_STARTS:-5}" # starts in a row without progress of the run before giving up; 0: no limit
WAIT="${WAIT:-120}"    # seconds for the other processes to end after the first has ended

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
need DATA WORKDIR
need_training
! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the processes write one checkpoint together: set it to a folder, not a bucket"
WORKDIR=$(realpath -m "$WORKDIR")
is_bucket "$DATA" || DATA=$(realpath -m "$DATA")
[[ $GPUS == all ]] || counts GPUS
counts PORT
numbers MAX_RESTARTS MAX_STARTS
seconds PAUSE WAIT
forget_places

# list_visible: set VISIBLE to the variable that restricts the GPUs, and the array FOUND to the GPUs that it allows.
list_visible() {
    local entry entries seen=,
    for VISIBLE in CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES ''; do
        [[ -n $VISIBLE && ! -v $VISIBLE ]] || break
    done
    FOUND=()
    if [[ -z $VISIBLE ]]; then
        VISIBLE=CUDA_VISIBLE_DEVICES
        list_all
        return
    fi
    IFS=', ' read -ra entries <<< "${!VISIBLE}"
    for entry in ${entries[@]+"${entries[@]}"}; do
        [[ $entry != -* && $entry != NoDevFiles ]] || break # CUDA reads no further
        [[ $entry =~ ^([0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+)$ ]] ||
            fail "$VISIBLE=${!VISIBLE}: expected GPU numbers or UUIDs, separated by commas"
        [[ $seen != *",$entry,"* ]] || fail "$VISIBLE=${!VISIBLE}: $entry is listed twice"
        seen+=$entry,
        FOUND+=("$entry")
    done
    [[ ${#FOUND[@]} -gt 0 ]] || fail "$VISIBLE=${!VISIBLE} leaves no GPU: unset it, or list the GPUs that this run may use"
}

# list_all: add the numbers of the GPUs that nvidia-smi lists; for GPUs with MIG devices, the UUIDs of the devices.
list_all() {
    local line
    while read -r line; do
        if [[ $line =~ ^GPU\ ([0-9]+): ]]; then
            FOUND+=("${BASH_REMATCH[1]}")
        elif [[ $line =~ ^MIG.*UUID:\ (MIG-[^\)]+) ]]; then
            [[ ${FOUND[-1]} == MIG-* ]] || unset 'FOUND[-1]'
            FOUND+=("${BASH_REMATCH[1]}")
        fi
    done < <(nvidia-smi --list-gpus 2> /dev/null)
}

list_visible
if [[ $GPUS == all ]]; then
    GPUS=${#FOUND[@]}
    [[ $GPUS -gt 0 ]] || fail "nvidia-smi lists no GPU: set GPUS to the number of processes to start"
elif [[ ${#FOUND[@]} == 0 ]]; then
    mapfile -t FOUND < <(seq 0 $((GPUS - 1)))
    say "nvidia-smi lists no GPU, so the GPU numbers are a guess"
elif [[ $GPUS -gt ${#FOUND[@]} ]]; then
    fail "GPUS=$GPUS: found only ${#FOUND[@]} (${FOUND[*]}); set GPUS to that or less, or to all"
fi
FOUND=("${FOUND[@]:0:GPUS}")
show_settings
say "GPUs: ${FOUND[*]}"

LAUNCH_ID=$(launch_id)
export DATA WORKDIR LOCAL COMPILATION_CACHE MAX_STARTS LAUNCH_ID
PIDS=()

all_run() {
    local pid
    for pid in "${PIDS[@]}"; do kill -0 "$pid" 2> /dev/null || return; done
}

# start NUMBER: the process of one GPU.
start() {
    local command=(env "$VISIBLE=${FOUND[$1]}" COORDINATOR="localhost:$PORT" PROCESSES="$GPUS" PROCESS="$1"
        "$LAUNCH/worker.sh" train "${OPTIONS[@]}")
    if [[ -n $DRY_RUN ]]; then
        echo "$(quoted "${command[@]}") &"
    else
        "${command[@]}" &
        PIDS+=($!)
    fi
}

# attempt: run all processes to their end, and return the largest of their exit codes.
attempt() {
    local number pid reaper code=0 status
    PIDS=()
    for ((number = 0; number < GPUS; number++)); do start "$number"; done
    [[ -z $DRY_RUN ]] || return 0
    while all_run; do sleep 1; done
    # The others are on their last step too, or wait forever for the lost process.
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
keep_running attempt; show_worker; exit # on one line, which bash has read: this file may be edited during a run of days
