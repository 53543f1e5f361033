#!/usr/bin/env bash
set -euo pipefail
# Train on a TPU pod slice of a GKE cluster, with XPK (https://github.com/AI-Hypercomputer/xpk, pip install xpk).
#
# usage: launch/xpk.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   PROJECT=lab ZONE=us-west4-a CLUSTER=pods IMAGE=us-docker.pkg.dev/lab/images/pathflip:1 DATA=gs://lab/cohort \
#       WORKDIR=/share/runs/base launch/xpk.sh --config align_large --config.data.records=records ...
#
# XPK runs it as a JobSet: all hosts start again when one is lost, or after exit code 75, MAX_RESTARTS times in total.
#
# Settings, here or in the environment:
PROJECT="${PROJECT:-}"   # Google Cloud project
ZONE="${ZONE:-}"         # zone of the cluster
CLUSTER="${CLUSTER:-}"   # cluster made by xpk cluster create
NAME="${NAME:-pathflip}" # name of the workload
IMAGE="${IMAGE:-}"       # image built from launch/Dockerfile with EXTRAS=tpu,gcs, pushed where the cluster can pull it
TPU_TYPE="${TPU_TYPE:-v5litepod-256}" # type of the slice
CAPACITY="${CAPACITY:---spot}" # --spot, --on-demand or --reservation=NAME
DATA="${DATA:-}"         # gs://... with records/, texts, slide table, tokenizer
WORKDIR="${WORKDIR:-}"   # run folder on storage that all hosts mount (xpk storage attach --auto-mount=true), or one on
#                         their own disks, with --config.train.checkpoints=gs://...
LOCAL="${LOCAL:-/tmp/pathflip}" # folder on the local disk of the hosts
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
MAX_RESTARTS="${MAX_RESTARTS:-100}" # restarts after preemptions and failures together: XPK does not tell them apart
MAX_STARTS="${MAX_STARTS:-5}" # starts in a row without progress of the run before giving up; 0: no limit
GRACE="${GRACE:-300}"    # seconds between SIGTERM and the end of a host, in which it saves

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
need PROJECT ZONE CLUSTER IMAGE DATA WORKDIR
need_training
! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the hosts write one checkpoint together: give a folder that all of them mount, or --config.train.checkpoints=$WORKDIR and a folder for the logs as WORKDIR"
numbers MAX_RESTARTS MAX_STARTS GRACE
show_settings

LAUNCH_ID=$(launch_id)
export DATA WORKDIR LOCAL COMPILATION_CACHE
SETTINGS=$(assignments DATA WORKDIR LOCAL COMPILATION_CACHE MAX_STARTS LAUNCH_ID)
# Exit code 1 is a host that lost the others: XPK starts again after 42 and 127 to 255 by itself, and fails after 2.
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
    --tpu-type="$TPU_TYPE" --num-slices=1 "$CAPACITY" --docker-image="$IMAGE" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes="1,$TRY_AGAIN" --termination-grace-period-seconds="$GRACE" \
    --command="export $SETTINGS PATHFLIP_DISTRIBUTED=1; /opt/pathflip/launch/worker.sh stage && exec /opt/pathflip/launch/worker.sh train $(quoted "${OPTIONS[@]}")"
show_worker
