#!/usr/bin/env bash
set -euo pipefail
# Train on several nodes of a Slurm cluster: one process per GPU, requeued when told to stop and when a node is lost.
#
# usage: launch/slurm.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   NODES=4 GPUS=8 DATA=/share/cohort WORKDIR=/share/runs/base launch/slurm.sh --config align_base \
#       --config.data.records=records ...
#
# Run it on a login node, or in a shell of another job, which it leaves alone: it submits itself as a job. The clone with
# its .venv, and WORKDIR, must be on a disk that all nodes share.
#
# Settings, here or in the environment:
NODES="${NODES:-2}"       # nodes of the job
GPUS="${GPUS:-8}"         # GPUs per node, with one process each
CPUS="${CPUS:-8}"         # CPUs per process
TIME="${TIME:-24:00:00}"  # time limit, at which the run saves and the job is requeued
NOTICE="${NOTICE:-300}"   # seconds before TIME at which SIGTERM is sent: time for a step and a save
NAME="${NAME:-pathflip}"  # name of the job
SBATCH="${SBATCH:-}"      # more options for sbatch, such as: --partition=gpu --comment='PathFLIP of the lab'
DATA="${DATA:-}"          # gs://... or s3://... with records/, texts, slide table, tokenizer; or a folder, read in place
WORKDIR="${WORKDIR:-}"    # run folder on a shared disk
LOCAL="${LOCAL:-/tmp/pathflip}" # folder on the local disk of a node for data from a bucket
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
MAX_RESTARTS="${MAX_RESTARTS:-20}" # a failed job is requeued if it has been requeued fewer times than this
MAX_STARTS="${MAX_STARTS:-5}" # starts in a row without progress of the run before giving up; 0: no limit
WAIT="${WAIT:-120}"       # seconds for the other processes to end after the first has ended

# shellcheck source=launch/common.sh
source "$(if [[ ${1-} == job ]]; then echo "$2"; else dirname "${BASH_SOURCE[0]}"; fi)/common.sh"

# sbatch is given `job FOLDER` before the options: Slurm's variables do not say whose job this is, and Slurm runs a copy
# of this file from another folder.
JOB=
if [[ ${1-} == job ]]; then
    JOB=${SLURM_JOB_ID-}
    [[ -n $JOB ]] || fail "job: only sbatch passes this argument, and SLURM_JOB_ID is not set; leave it out"
    shift 2
fi
read_options "$@"
need NODES GPUS DATA WORKDIR
need_training
counts NODES GPUS CPUS
numbers NOTICE WAIT MAX_RESTARTS MAX_STARTS
! is_bucket "$WORKDIR" || fail "WORKDIR=$WORKDIR: the processes write one checkpoint together: set it to a folder on a shared disk"
WORKDIR=$(realpath -m "$WORKDIR")
is_bucket "$DATA" || DATA=$(realpath -m "$DATA")
words SBATCH
[[ -n $JOB ]] || show_settings
forget_places
export DATA WORKDIR LOCAL COMPILATION_CACHE MAX_STARTS

# submit: submit this script as a job, without the variables and the GPUs of a job that this shell may be in.
submit() {
    local name outside=()
    for name in "${!SLURM_@}" "${!PMI_@}" "${!PMIX_@}"; do
        [[ $name == SLURM_CONF ]] || outside+=(-u "$name")
    done
    for name in CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES ZE_AFFINITY_MASK GPU_DEVICE_ORDINAL; do
        [[ ! -v $name ]] || outside+=(-u "$name")
    done
    [[ -z ${SLURM_JOB_ID-} ]] || say "this shell is in job $SLURM_JOB_ID, which is left alone; submitting a separate job"
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
trap : TERM HUP # these are for the processes; this shell stays, to requeue the job
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
