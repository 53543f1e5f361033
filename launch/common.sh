# Functions that the launch scripts share; sourced after their settings, never run.
# shellcheck shell=bash

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "bash 4.4 or newer is needed" >&2; exit 2; }

# shellcheck disable=SC2034 # for the scripts
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Exit codes of `pathflip train` that decide what follows: wrong input, and stopped after saving.
readonly WRONG_INPUT=2 TRY_AGAIN=75

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
    say "$@"
    exit "$WRONG_INPUT"
}

# read_options "$@": --help prints the head of the script with its settings, --dry-run sets DRY_RUN; the rest is OPTIONS.
read_options() {
    DRY_RUN=
    while [[ ${1-} == --help || ${1-} == -h || ${1-} == --dry-run ]]; do
        if [[ $1 != --dry-run ]]; then
            sed -n '2,/^source /{/^set \|^source \|^# shellcheck/d;s/^# \{0,1\}//;p}' "$0"
            exit 0
        fi
        DRY_RUN=1
        shift
    done
    OPTIONS=("$@")
}

# need NAME...: stop where a setting is empty, and print its comment.
need() {
    local name
    for name; do
        [[ -n ${!name-} ]] || fail "$name is empty ($(sed -n "s/^$name=[^#]*# //p" "$0")); set it at the top of $0, or in the environment"
    done
}

# counts, numbers, seconds NAME...: stop unless each setting is a whole number of at least 1, of at least 0, or seconds.
counts() { matching '^[1-9][0-9]*$' 'a whole number, 1 or more' "$@"; }
numbers() { matching '^(0|[1-9][0-9]*)$' 'a whole number, 0 or more' "$@"; }
seconds() { matching '^[0-9]+([.][0-9]+)?$' 'seconds' "$@"; }

matching() {
    local name pattern=$1 expected=$2
    shift 2
    for name; do
        [[ ${!name} =~ $pattern ]] || fail "$name=${!name}: expected $expected"
    done
}

# words NAME: a setting of several words as the array WORDS. Quotes hold a word together as in a shell; nothing expands.
# shellcheck disable=SC2034 # for the scripts
words() {
    local text=${!1} lines
    WORDS=()
    [[ $text =~ [^[:space:]] ]] || return 0
    lines=$(xargs printf '%s\n' <<< "$text" 2> /dev/null) || fail "$1=$text: a quote is not closed"
    mapfile -t WORDS <<< "$lines"
}

# show_settings: print which settings come from the environment, on purpose or not, and which from the script.
show_settings() {
    local name given=() written=()
    while read -r name; do
        [[ -n ${!name} ]] || continue
        if [[ $(declare -p "$name") =~ ^declare\ -[a-z]*x ]]; then given+=("$name=${!name}"); else written+=("$name=${!name}"); fi
    done < <(sed -n '/^source /q;s/^\([A-Z_]*\)="\${\1.*/\1/p' "$0")
    [[ ${#given[@]} == 0 ]] || say "settings from the environment: $(quoted "${given[@]}")"
    [[ ${#written[@]} == 0 ]] || say "settings from the top of the script: $(quoted "${written[@]}")"
}

# forget_places: unset the variables by which another launcher placed its own processes, which would mislead these.
forget_places() {
    local name
    for name in COORDINATOR PROCESSES PROCESS WAIT_FOR JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_BIND_ADDRESS \
        JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_LOCAL_DEVICE_IDS; do
        [[ -v $name ]] || continue
        say "ignoring $name=${!name} from the environment: this script places its processes itself"
        unset "$name"
    done
}

# need_training: stop without options for `pathflip train`; the run folder and the processes are the launcher's to set.
need_training() {
    local option
    [[ ${#OPTIONS[@]} -gt 0 ]] ||
        fail "no options for pathflip train, such as --config align_base --config.data.records=records (see --help)"
    for option in "${OPTIONS[@]}"; do
        [[ $option != --workdir* ]] || fail "$option: the run folder is the setting WORKDIR; set that instead"
    done
}

is_bucket() { [[ $1 == gs://* || $1 == s3://* ]]; }

# quoted WORD...: one line that a shell reads as these words.
quoted() {
    local word line=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# assignments NAME...: these settings as NAME=value words, for a shell elsewhere.
assignments() {
    local name
    for name; do quoted "$name=${!name}"; done | paste -sd' '
}

# run COMMAND...: print it and run it; print alone in a dry run.
run() {
    if [[ -n $DRY_RUN ]]; then
        quoted "$@"
    else
        say "$(quoted "$@")"
        "$@"
    fi
}

# show_worker: in a dry run, what every host will run, as comments. The settings of worker.sh must be exported.
show_worker() {
    [[ -n $DRY_RUN ]] || return 0
    {
        echo "every host, with $LAUNCH/worker.sh:"
        "$LAUNCH/worker.sh" --dry-run stage
        "$LAUNCH/worker.sh" --dry-run train "${OPTIONS[@]}"
    } | sed 's/^/# /'
}

# launch_id: a name for this launch, which stays the same when it starts its processes again.
launch_id() { if [[ -n $DRY_RUN ]]; then echo dry-run; else echo "$(uname -n)-$$-$(date +%s)"; fi; }

# step_of FOLDER: the step of a run: of its newest checkpoint or, where checkpoints are elsewhere, of its last metrics row.
step_of() {
    local path step=0
    if [[ -d $1/checkpoints ]]; then
        for path in "$1"/checkpoints/*; do
            path=${path##*/}
            [[ $path =~ ^[0-9]+$ ]] && ((10#$path > step)) && step=$((10#$path))
        done
    elif [[ -r $1/metrics.jsonl ]]; then
        step=$(tail -n 1 "$1/metrics.jsonl" | sed -n 's/.*"step": *\([0-9]\{1,15\}\).*/\1/p')
    fi
    echo "${step:-0}"
}

# count_start FOLDER PROCESS: record that a process of this LAUNCH_ID starts the run, and give up after MAX_STARTS starts
# without progress: another start does not cure a fault that ends a run at the same step each time.
count_start() {
    local file=$1/starts/$2 step count=0 id most
    [[ -n $LAUNCH_ID && $MAX_STARTS != 0 && -z $DRY_RUN ]] || return 0
    step=$(step_of "$1")
    if [[ -r $file ]] && read -r id most count < "$file" && [[ $id == "$LAUNCH_ID" && $step -le $most ]]; then
        step=$most
    else
        count=0
    fi
    ((count < MAX_STARTS)) ||
        fail "$count starts, and $1 is still at step $step: giving up. Find out why they ended, then launch again; MAX_STARTS limits starts without progress"
    { mkdir -p "$1/starts" && echo "$LAUNCH_ID $step $((count + 1))" > "$file"; } 2> /dev/null ||
        say "cannot write $file: starts without progress are not counted"
}

# keep_running COMMAND...: run it until it succeeds, and return its last exit code. After a stop with a saved checkpoint
# it starts again as long as it makes progress (count_start); after any other failure (a killed process, a lost host)
# up to MAX_RESTARTS times, PAUSE seconds later; never after wrong input, nor once STOPPING is set.
keep_running() {
    local failures=0 code=$TRY_AGAIN
    while [[ -z ${STOPPING-} ]]; do
        code=0
        "$@" || code=$?
        [[ $code != 0 && $code != "$WRONG_INPUT" && -z ${STOPPING-} ]] || return "$code"
        if [[ $code == "$TRY_AGAIN" ]]; then
            say "stopped after saving: starting again"
        elif ((++failures <= MAX_RESTARTS)); then
            say "exit code $code: starting again ($failures of $MAX_RESTARTS)"
            sleep "$PAUSE"
        else
            say "exit code $code, started again $MAX_RESTARTS times: giving up"
            return "$code"
        fi
    done
    return "$code"
}
