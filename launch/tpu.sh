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
# The request is made, waited for, given this clone (its commit, not what is uncommitted), the locked packages and the
# data, and trains. Preempted, it is deleted and made anew and the run goes on; at the end, or on ctrl-C, it is deleted.
# Keep this script running (tmux) on a machine that stays up, with gcloud logged in.
#
# Settings, here or in the environment:
PROJECT="${PROJECT:-}"   # Google Cloud project
ZONE="${ZONE:-}"         # zone with this accelerator
NAME="${NAME:-pathflip}" # of the queued resource and its node
ACCELERATOR_TYPE="${ACCELERATOR_TYPE:-v5litepod-8}"       # v5litepod-1, -4, -8: one host; v5litepod-16 to -256: a pod slice
RUNTIME_VERSION="${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}" # v6e: v2-alpha-tpuv6e
CREATE_OPTIONS="${CREATE_OPTIONS---spot}" # of gcloud ... queued-resources create; empty: on demand, which costs more
SCOPES="${SCOPES:-cloud-platform}" # of the hosts' service account: they read DATA and write WORKDIR
DATA="${DATA:-}"       # gs://... with records/, texts, slide table, tokenizer
WORKDIR="${WORKDIR:-}" # run folder: of one host gs://..., of a pod slice a folder that PREPARE mounts on all hosts, or
#                       one on their own disks, with --config.train.checkpoints=gs://...
LOCAL="${LOCAL:-/tmp/pathflip}" # local disk of the hosts
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
BACKUP_SECONDS="${BACKUP_SECONDS:-300}" # seconds between two copies of the run to WORKDIR=gs://...
PREPARE="${PREPARE:-}"  # command for every host, before all else, such as: sudo mount -t nfs 10.0.0.2:/share /share
MAX_RESTARTS="${MAX_RESTARTS:-20}" # after failures; a preemption is none
PAUSE="${PAUSE:-60}"   # seconds before starting again after a failure
POLL="${POLL:-30}"     # seconds between two looks at the request

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
need PROJECT ZONE DATA WORKDIR
need_training
[[ $DATA == gs://* ]] || fail "DATA=$DATA: the hosts read from a bucket, gs://..."

case $ACCELERATOR_TYPE in
    v5litepod-[148] | v6e-[148]) DISTRIBUTED= ;;
    *)
        DISTRIBUTED=1 # JAX finds the hosts by the metadata of the TPU
        ! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the hosts of $ACCELERATOR_TYPE write one checkpoint together: give a folder that PREPARE mounts on all of them, or --config.train.checkpoints=$WORKDIR and a folder for the logs"
        ;;
esac
export DATA WORKDIR LOCAL COMPILATION_CACHE BACKUP_SECONDS
PLACE=(--project="$PROJECT" --zone="$ZONE")
WORKER="PATHFLIP_DISTRIBUTED=$DISTRIBUTED $(assignments DATA WORKDIR LOCAL COMPILATION_CACHE BACKUP_SECONDS) pathflip/launch/worker.sh"
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

create() {
    local more
    PREPARED=
    read -ra more <<< "$CREATE_OPTIONS"
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${PLACE[@]}" \
        --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" --scopes="$SCOPES" "${more[@]}"
}

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet; }

on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all "--command=$1"; }

# prepare: code, packages and data on every host of the request.
prepare() {
    local archive="${TMPDIR:-/tmp}/$NAME.tar.gz"
    { [[ -z $PREPARE ]] || on_all_hosts "$PREPARE"; } &&
        run git -C "$LAUNCH/.." archive --format=tar.gz --output="$archive" HEAD &&
        run gcloud compute tpus tpu-vm scp "$archive" "$NAME:pathflip.tar.gz" "${PLACE[@]}" --worker=all &&
        on_all_hosts "mkdir -p pathflip && tar -xzf pathflip.tar.gz -C pathflip && $WORKER install tpu,gcs && $WORKER stage" &&
        PREPARED=1
}

# bring_up: until the request is granted and its hosts are prepared.
bring_up() {
    while true; do
        case $(state) in
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

# attempt: train until the end, a failure, or the loss of the hosts, which is as good as a stop: the run was saved.
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
    delete
}

exec 3>&1
trap finish EXIT
trap 'exit 130' INT TERM HUP
[[ -z $DRY_RUN ]] || create # which sees the request as granted
keep_running attempt; show_worker; exit # one line, read whole: this file may change while it runs for days
