#!/usr/bin/env bash
set -euo pipefail
# Train on several nodes of a Slurm cluster: one process a GPU, requeued when told to stop and when a node is lost.
#
# usage: launch/slurm.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   NODES=4 GPUS=8 DATA=/share/cohort WORKDIR=/share/runs/base launch/slurm.sh --config align_base \
#       --config.data.records=records ...
#
# Run on a login node, or in a shell of another job, which stays as it is, it submits itself. The clone with its .venv,
# and WORKDIR, lie on a disk that all nodes share.
#
# Settings, here or in the environment:
NODES="${NODES:-2}"       # of the job
GPUS="${GPUS:-8}"         # of a node; one process each
CPUS="${CPUS:-8}"         # of a process
TIME="${TIME:-24:00:00}"  # then the run saves and the job is requeued
NOTICE="${NOTICE:-300}"   # seconds before that, for SIGTERM: time for a step and a save
NAME="${NAME:-pathflip}"  # of the job
SBATCH="${SBATCH:-}"      # more options of sbatch, such as: --partition=gpu --comment='PathFLIP of the lab'
DATA="${DATA:-}"          # gs://... or s3://... with records/, texts, slide table, tokenizer; or a folder: read in place
WORKDIR="${WORKDIR:-}"    # run folder on a shared disk
LOCAL="${LOCAL:-/tmp/pathflip}" # local disk of a node, for what comes from a bucket
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
MAX_RESTARTS="${MAX_RESTARTS:-20}" # a failing job is requeued while it was requeued fewer times than this
MAX_STARTS="${MAX_STARTS:-5}" # in vain: the run has come no further since the first of them; 0: without limit
WAIT="${WAIT:-120}"       # seconds that the other processes have to end, after the first

# shellcheck source=launch/common.sh
source "$(if [[ ${1-} == job ]]; then echo "$2"; else dirname "${BASH_SOURCE[0]}"; fi)/common.sh"

# `job FOLDER` before the options is what sbatch is told: variables of Slurm do not say whose job this is, and there a
# copy of this file runs from elsewhere.
JOB=
if [[ ${1-} == job ]]; then
    JOB=${SLURM_JOB_ID-}
    [[ -n $JOB ]] || fail "job: is for sbatch alone, and this is no job"
    shift 2
fi
read_options "$@"
need NODES GPUS DATA WORKDIR
need_training
counts NODES GPUS CPUS
numbers NOTICE WAIT MAX_RESTARTS MAX_STARTS
! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the processes write one checkpoint together, so give a folder on a shared disk"
WORKDIR=$(realpath -m "$WORKDIR")
is_bucket "$DATA" || DATA=$(realpath -m "$DATA")
words SBATCH
[[ -n $JOB ]] || show_settings
forget_places
export DATA WORKDIR LOCAL COMPILATION_CACHE MAX_STARTS

# submit: make a job of this script, with none of the variables of a job that this shell is in, nor its GPUs.
submit() {
    local name outside=()
    for name in "${!SLURM_@}" "${!PMI_@}" "${!PMIX_@}"; do
        [[ $name == SLURM_CONF ]] || outside+=(-u "$name")
    done
    for name in CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES ZE_AFFINITY_MASK GPU_DEVICE_ORDINAL; do
        [[ ! -v $name ]] || outside+=(-u "$name")
    done
    [[ -z ${SLURM_JOB_ID-} ]] || say "this shell is in job $SLURM_JOB_ID: that stays as it is, and a job of its own is submitted"
    for name in "${!SBATCH_@}"; do
        say "sbatch takes $name=${!name} from the environment"
    done
    # JAX gives process i of a node GPU i, so all processes must see all GPUs: --gpus-per-node, not --gpus-per-task.
    run ${outside[0]:+env "${outside[@]}"} sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" \
        --gpus-per-node="$GPUS" --cpus-per-task="$CPUS" --time="$TIME" --signal="TERM@$NOTICE" --requeue \
        --open-mode=append --export=ALL "${WORDS[@]}" "$LAUNCH/slurm.sh" job "$LAUNCH" "${OPTIONS[@]}"
}

if [[ -z $JOB ]]; then
    submit
    [[ -n $DRY_RUN ]] || exit 0
fi

# From here on: the job, on its first node.
export LAUNCH_ID="slurm-$JOB" # a requeued job keeps its number
trap : TERM HUP # are for the processes; this shell stays, to requeue
code=0
run srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 "$LAUNCH/worker.sh" stage || code=$?
if [[ $code == 0 ]]; then
    # Not --kill-on-bad-exit: after 75 the others are still saving.
    run env PATHFLIP_DISTRIBUTED="$((NODES * GPUS > 1))" srun --nodes="$NODES" --ntasks-per-node="$GPUS" \
        --cpus-per-task="$CPUS" --wait="$WAIT" "$LAUNCH/worker.sh" train "${OPTIONS[@]}" || code=$?
fi
if [[ -n $DRY_RUN ]]; then
    show_worker
elif [[ $code == "$TRY_AGAIN" ]]; then
    run scontrol requeue "$JOB"
elif [[ $code != 0 && $code != "$WRONG_INPUT" && ${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]]; then
    say "exit code $code: requeued"
    run scontrol requeue "$JOB"
else
    exit "$code"
fi
