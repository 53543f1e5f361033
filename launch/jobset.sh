#!/usr/bin/env bash
set -euo pipefail
# Train on the nodes of a Kubernetes cluster, as a JobSet (0.10 or newer, https://jobset.sigs.k8s.io): one pod per node.
#
# usage: launch/jobset.sh [--dry-run | --help] OPTIONS OF pathflip train
#
#   IMAGE=registry/pathflip:1 NODES=4 DATA=s3://lab/cohort WORKDIR=/share/runs/base SHARED_CLAIM=share \
#       launch/jobset.sh --config align_base --config.data.records=records ...
#
# All pods start again after exit code 75 or a lost node, as long as the run makes progress (MAX_STARTS); after any
# other failure MAX_RESTARTS times; wrong input (exit code 2) ends the JobSet. --dry-run prints the manifest: redirect it
# to a file to adapt it.
#
# Settings, here or in the environment:
NAME="${NAME:-pathflip}"   # name of the JobSet
NAMESPACE="${NAMESPACE:-default}"
CONTEXT="${CONTEXT:-}"     # kubectl context; empty: the current one
IMAGE="${IMAGE:-}"         # image built from launch/Dockerfile, pushed where the cluster can pull it
NODES="${NODES:-2}"        # number of nodes, with one pod each
RESOURCE="${RESOURCE:-nvidia.com/gpu}" # accelerator resource; google.com/tpu for TPUs
PER_NODE="${PER_NODE:-8}"  # amount of that resource per node
NODE_SELECTOR="${NODE_SELECTOR:-}" # label=value ..., such as: cloud.google.com/gke-tpu-topology=4x4
SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}" # Kubernetes service account that may read DATA
DATA="${DATA:-}"           # gs://... or s3://... with records/, texts, slide table, tokenizer; or a folder under /share
WORKDIR="${WORKDIR:-}"     # run folder under /share; with NODES=1 also gs://... or s3://...
SHARED_CLAIM="${SHARED_CLAIM:-}" # ReadWriteMany volume claim that is mounted at /share; empty: none
LOCAL="${LOCAL:-/var/tmp/pathflip}" # local disk of a node, kept between restarts
COMPILATION_CACHE="${COMPILATION_CACHE:-}" # folder of compiled programs; empty: compiled/ in the run folder
PORT="${PORT:-8476}"       # at which the processes connect to each other
GRACE="${GRACE:-300}"      # seconds between SIGTERM and the end of a pod, in which it saves
MAX_RESTARTS="${MAX_RESTARTS:-20}" # restarts after failures; stops and lost nodes do not count
MAX_STARTS="${MAX_STARTS:-5}" # starts in a row without progress of the run before giving up; 0: no limit

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
need IMAGE DATA WORKDIR
need_training
[[ $NODES == 1 ]] || ! is_bucket "$WORKDIR" ||
    fail "WORKDIR=$WORKDIR: the pods write one checkpoint together: give a folder under /share and SHARED_CLAIM, or give --config.train.checkpoints=$WORKDIR and a folder for the logs as WORKDIR"
[[ $WORKDIR != /share* || -n $SHARED_CLAIM ]] || fail "WORKDIR=$WORKDIR: set SHARED_CLAIM to the volume claim that is mounted at /share"
counts NODES PER_NODE PORT
numbers GRACE MAX_RESTARTS MAX_STARTS
words NODE_SELECTOR
show_settings

# text WORD: the word as a YAML string.
text() { printf "'%s'" "${1//\'/\'\'}"; }

# arguments WORD...: entries of a container's args.
arguments() {
    local word
    for word; do echo "                    - $(text "$word")"; done
}

# environment NAME=VALUE...: entries of a container's env.
environment() {
    local pair
    for pair; do printf '                    - {name: %s, value: %s}\n' "${pair%%=*}" "$(text "${pair#*=}")"; done
}

hosts() {
    local number
    for ((number = 0; number < NODES; number++)); do echo "$NAME-worker-0-$number.$NAME"; done
}

selector() {
    local pair
    for pair in "${WORDS[@]}"; do printf '                %s: %s\n' "${pair%%=*}" "$(text "${pair#*=}")"; done
}

volumes() {
    local entry=$1
    if [[ $entry == mount ]]; then
        echo "                    - {name: local, mountPath: $(text "$LOCAL")}"
        echo "                    - {name: shm, mountPath: /dev/shm}"
        [[ -z $SHARED_CLAIM ]] || echo "                    - {name: share, mountPath: /share}"
    else
        echo "                - {name: local, hostPath: {path: $(text "$LOCAL"), type: DirectoryOrCreate}}"
        echo "                - {name: shm, emptyDir: {medium: Memory}}"
        [[ -z $SHARED_CLAIM ]] || echo "                - {name: share, persistentVolumeClaim: {claimName: $(text "$SHARED_CLAIM")}}"
    fi
}

manifest() {
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$NAME")
  namespace: $(text "$NAMESPACE")
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: false # a pod that is still staging has no name yet, and the others wait for it
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    restartStrategy: BlockingRecreate # so that no pod of one attempt meets one of the next
    rules: # matched against the Job's reason and message, which name its rule; other failures restart and count
      - name: wrongInput
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ['exit code $WRONG_INPUT matching']
      - name: stoppedOrLost
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: worker
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $NODES
          parallelism: $NODES
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob # wrong input: no restart cures it
                onExitCodes: {operator: In, values: [$WRONG_INPUT]}
              - action: FailJob # stopped after saving
                onExitCodes: {operator: In, values: [$TRY_AGAIN]}
              - action: FailJob # the node was lost, drained or preempted
                onPodConditions: [{type: DisruptionTarget, status: 'True'}]
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: $(text "$SERVICE_ACCOUNT")
              terminationGracePeriodSeconds: $GRACE
              nodeSelector: $([[ -n $NODE_SELECTOR ]] || echo '{}')
$(selector)
              volumes:
$(volumes entry)
              initContainers:
                - name: stage
                  image: $(text "$IMAGE")
                  args: [stage]
                  env: &settings
$(environment "DATA=$DATA" "WORKDIR=$WORKDIR" "LOCAL=$LOCAL" "COMPILATION_CACHE=$COMPILATION_CACHE" \
    "MAX_STARTS=$MAX_STARTS" "COORDINATOR=$NAME-worker-0-0.$NAME:$PORT" "PROCESSES=$NODES" "WAIT_FOR=$(hosts | paste -sd' ')")
                    - name: PROCESS
                      valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
                    - name: LAUNCH_ID # the same for all starts of a JobSet, unlike the UIDs of its pods
                      valueFrom: {fieldRef: {fieldPath: "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"}}
                  volumeMounts: &mounts
$(volumes mount)
              containers:
                - name: train
                  image: $(text "$IMAGE")
                  args:
                    - train
$(arguments "${OPTIONS[@]}")
                  env: *settings
                  volumeMounts: *mounts
                  resources:
                    limits: {$RESOURCE: $PER_NODE}
YAML
}

CREATE=(kubectl ${CONTEXT:+--context="$CONTEXT"} create --validate=strict --filename=-)
if [[ -n $DRY_RUN ]]; then
    echo "# $(quoted "${CREATE[@]}")"
    manifest
    export DATA WORKDIR LOCAL COMPILATION_CACHE
    show_worker
else
    [[ -n $CONTEXT ]] || say "kubectl's current context: $(kubectl config current-context || echo unknown)"
    manifest | run "${CREATE[@]}"
fi
