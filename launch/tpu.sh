#!/usr/bin/env bash
set -euo pipefail
# Train on Cloud TPUs: one spot v5e-8 host (the default), or a pod slice of several hosts, as a queued resource.
#
# usage: launch/tpu.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   PROJECT=lab ZONE=us-west4-a DATA=gs://lab/cohort WORKDIR=gs://lab/runs/base launch/tpu.sh --config align_base \
#       --config.data.records=records --config.data.texts=reports.jsonl --config.data.slides=slides.csv \
#       --config.data.tokenizer=bert --config.model.bert=bert
#
# The script requests the TPU, waits for it, gives it this clone (its last commit, without uncommitted changes), the locked
# packages and the data, and trains. If the TPU is preempted, the request is deleted and made again, and the run resumes;
# at the end, or on ctrl-C, the request is deleted. An existing request of this name is taken to be another run's and is
# left alone.
# Keep this script running (tmux) on a machine that stays up, with gcloud logged in.
#
# Settings, here or in the environment:
PROJECT="${PROJECT:-}"   # Google Cloud project
ZONE="${ZONE:-}"         # zone with this accelerator
NAME="${NAME:-pathflip}" # name of the queued resource and its node
ACCELERATOR_TYPE="${ACCELERATOR_TYPE:-v5litepod-8}"       # v5litepod-1, -4, -8: one host; v5litepod-16 to -256: a pod slice
RUNTIME_VERSION="${RUNTIME_VERSION:-}" # TPU software; empty: the one that Google names for the accelerator
CREATE_OPTIONS="${CREATE_OPTIONS---spot}" # options for gcloud ... queued-resources create; empty: on demand, which costs more
SCOPES="${SCOPES:-cloud-platform}" # access scopes of the hosts' service account, which reads DATA and writes WORKDIR
DATA="${DATA:-}"       # gs://... with records/, texts, slide table, tokenizer
WORKDIR="${WORKDIR:-}" # run folder: for one host gs://...; for a pod slice a folder that PREPARE mounts on all hosts, or
#                       one on their own disks, with --config.train.checkpoints=gs://...
LOCAL="${LOCAL:-/tmp/pathflip}" # folder on the local disk of the hosts
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
BACKUP_SECONDS="${BACKUP_SECONDS:-300}" # seconds between two copies of the run to WORKDIR=gs://...
PREPARE="${PREPARE:-}"  # command to run first on every host, such as: sudo mount -t nfs 10.0.0.2:/share /share
MAX_RESTARTS="${MAX_RESTARTS:-20}" # restarts after failures; a preemption does not count
MAX_STARTS="${MAX_STARTS:-5}" # starts in a row without progress of the run before giving up; 0: no limit
PAUSE="${PAUSE:-60}"   # seconds before starting again after a failure
POLL="${POLL:-30}"     # seconds between two checks of the request

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
need PROJECT ZONE DATA WORKDIR
need_training
[[ $DATA == gs://* ]] || fail "DATA=$DATA: expected a bucket, gs://..., from which the hosts can read"

numbers MAX_RESTARTS MAX_STARTS
seconds PAUSE POLL BACKUP_SECONDS
words CREATE_OPTIONS

case $ACCELERATOR_TYPE in
    v5litepod-[148] | v6e-[148] | v[234]-8 | v5p-8) DISTRIBUTED='' HOSTS="one host" ;;
    *)
        DISTRIBUTED=1 HOSTS="a pod slice of several hosts" # JAX finds them by the metadata of the TPU
        ! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the hosts of $ACCELERATOR_TYPE write one checkpoint together: give a folder that PREPARE mounts on all of them, or --config.train.checkpoints=$WORKDIR and a folder for the logs as WORKDIR"
        ;;
esac
if [[ -z $RUNTIME_VERSION ]]; then
    case $ACCELERATOR_TYPE in
        v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
        v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
        v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
        v[234]-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
        *) fail "RUNTIME_VERSION is empty, and none is known for ACCELERATOR_TYPE=$ACCELERATOR_TYPE: set it" ;;
    esac
fi
show_settings
say "$ACCELERATOR_TYPE is treated as $HOSTS, with the software $RUNTIME_VERSION"
LAUNCH_ID=$(launch_id)
export DATA WORKDIR LOCAL COMPILATION_CACHE BACKUP_SECONDS
PLACE=(--project="$PROJECT" --zone="$ZONE")
WORKER="PATHFLIP_DISTRIBUTED=$DISTRIBUTED $(assignments DATA WORKDIR LOCAL COMPILATION_CACHE BACKUP_SECONDS MAX_STARTS LAUNCH_ID) pathflip/launch/worker.sh"
FOLDER=   # on this machine, for the archive of the code
PREPARED= # set once the hosts of this request have code and data

# state: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; nothing where there is no such request. A dry run sees it granted.
state() {
    if [[ -n $DRY_RUN ]]; then
        run gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=value(state.state)' >&3
        echo ACTIVE
    else
        gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=value(state.state)' 2> /dev/null || true
    fi
}

# require_free: the name must not be that of another run's request, which this script would train on and delete.
require_free() {
    local told
    if told=$(gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=value(state.state)' 2>&1); then
        fail "NAME=$NAME: a request of this name exists ($told), perhaps of another run: set another NAME, or delete it: $(quoted gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force)"
    fi
    [[ $told == *NOT_FOUND* || $told == *"not found"* ]] || fail "gcloud cannot tell whether a request $NAME exists: $told"
}

create() {
    PREPARED=
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${PLACE[@]}" \
        --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" --scopes="$SCOPES" "${WORDS[@]}"
}

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet; }

on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all "--command=$1"; }

# prepare: code, packages and data on every host of the request.
prepare() {
    local archive=/tmp/pathflip.tar.gz # only of this launch: these hosts must not get the commit of another
    [[ -n $DRY_RUN ]] || { FOLDER=${FOLDER:-$(mktemp -d)} && archive=$FOLDER/pathflip.tar.gz; } || return
    [[ -n $DRY_RUN || -z $(git -C "$LAUNCH/.." status --porcelain --untracked-files=no) ]] ||
        say "the hosts get the last commit, without the changes since"
    { [[ -z $PREPARE ]] || on_all_hosts "$PREPARE"; } &&
        run git -C "$LAUNCH/.." archive --format=tar.gz --output="$archive" HEAD &&
        run gcloud compute tpus tpu-vm scp "$archive" "$NAME:pathflip.tar.gz" "${PLACE[@]}" --worker=all &&
        on_all_hosts "mkdir -p pathflip && tar -xzf pathflip.tar.gz -C pathflip && $WORKER install tpu,gcs && $WORKER stage" &&
        PREPARED=1
}

# bring_up: wait until the request is granted and its hosts are prepared.
bring_up() {
    local now told=
    while true; do
        now=$(state)
        [[ -n $DRY_RUN || $now == "$told" ]] || say "request $NAME: ${now:-no such request}"
        told=$now
        case $now in
            ACTIVE) break ;;
            '') create || return ;;
            SUSPENDED) delete || return ;;
            FAILED) # a wrong request, or no quota: not to be repeated without end
                delete
                return 1
                ;;
            *) sleep "$POLL" ;;
        esac
    done
    [[ -n $PREPARED ]] || prepare
}

# attempt: train until the end, a failure, or the loss of the hosts, which counts as a stop: the run was saved.
attempt() {
    local training code=0
    bring_up || return
    training=(gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all "--command=$WORKER train $(quoted "${OPTIONS[@]}")")
    if [[ -n $DRY_RUN ]]; then
        quoted "${training[@]}"
        return
    fi
    say "$(quoted "${training[@]}")"
    set -m # a group of its own, so that all of it can be ended
    "${training[@]}" < /dev/null &
    SSH=$!
    set +m
    while kill -0 "$SSH" 2> /dev/null; do
        sleep "$POLL"
        case $(state) in
            SUSPENDING | SUSPENDED | FAILED) kill -- "-$SSH" 2> /dev/null || true ;;
        esac
    done
    wait "$SSH" || code=$?
    [[ $code == 0 || $(state) == ACTIVE ]] || code=$TRY_AGAIN
    return "$code"
}

finish() {
    [[ -z ${SSH-} ]] || kill -- "-$SSH" 2> /dev/null || true
    [[ -z $FOLDER ]] || rm -rf "$FOLDER"
    delete
}

exec 3>&1
[[ -n $DRY_RUN ]] || require_free
trap finish EXIT
trap 'exit 130' INT TERM HUP
[[ -z $DRY_RUN ]] || create # which sees the request as granted
keep_running attempt; show_worker; exit # on one line, which bash has read: this file may be edited during a run of days
