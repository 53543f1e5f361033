#!/usr/bin/env bash
set -euo pipefail
# Train on one node with several GPUs: one process a GPU, started again together when one stops or is lost.
#
# usage: launch/gpus.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   DATA=gs://lab/cohort WORKDIR=runs/base launch/gpus.sh --config align_base --config.data.records=records ...
#
# Of the GPUs, those that CUDA_VISIBLE_DEVICES leaves: numbers, or UUIDs of GPUs and of MIG devices (HIP_VISIBLE_DEVICES
# and ROCR_VISIBLE_DEVICES where it is not set); without it, those that nvidia-smi lists.
#
# SIGTERM, SIGHUP and ctrl-C reach the processes, which save; then this script ends with their exit code, 75.
#
# Settings, here or in the environment:
GPUS="${GPUS:-all}"    # how many of them, or all
DATA="${DATA:-}"       # gs://... or s3://... with records/, texts, slide table, tokenizer; or a folder: read in place
WORKDIR="${WORKDIR:-}" # run folder
LOCAL="${LOCAL:-/tmp/pathflip}" # local disk, for what comes from a bucket
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
PORT="${PORT:-8476}"   # where the processes meet
MAX_RESTARTS="${MAX_RESTARTS:-20}" # after failures; a stop after saving is none
PAUSE="${PAUSE:-10}"   # seconds before starting again after a failure
MAX_STARTS="${MAX_STARTS:-5}" # in vain: the run has come no further since the first of them; 0: without limit
WAIT="${WAIT:-120}"    # seconds that the other processes have to end, after the first

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
need DATA WORKDIR
need_training
! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the processes write one checkpoint together, so give a folder"
WORKDIR=$(realpath -m "$WORKDIR")
is_bucket "$DATA" || DATA=$(realpath -m "$DATA")
[[ $GPUS == all ]] || counts GPUS
counts PORT
numbers MAX_RESTARTS MAX_STARTS
seconds PAUSE WAIT
forget_places

# list_visible: VISIBLE, the variable that says which GPUs may be used, and these as the array FOUND.
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
            fail "$VISIBLE=${!VISIBLE}: expected numbers or UUIDs of GPUs, with commas between them"
        [[ $seen != *",$entry,"* ]] || fail "$VISIBLE=${!VISIBLE}: $entry is there twice"
        seen+=$entry,
        FOUND+=("$entry")
    done
    [[ ${#FOUND[@]} -gt 0 ]] || fail "$VISIBLE=${!VISIBLE} leaves no GPU: unset it, or name those that this run may use"
}

# list_all: of nvidia-smi, the numbers of GPUs; of those that are cut into MIG devices, the UUIDs of these.
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
    [[ $GPUS -gt 0 ]] || fail "nvidia-smi shows no GPU: set GPUS, how many processes to start"
elif [[ ${#FOUND[@]} == 0 ]]; then
    mapfile -t FOUND < <(seq 0 $((GPUS - 1)))
    say "nvidia-smi shows no GPU, so their numbers are a guess"
elif [[ $GPUS -gt ${#FOUND[@]} ]]; then
    fail "GPUS=$GPUS: there are ${#FOUND[@]}, ${FOUND[*]}"
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
