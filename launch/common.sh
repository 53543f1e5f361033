# What the launch scripts share; sourced after their settings, never run.
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

# need NAME...: stop where a setting is empty, with what its comment says.
need() {
    local name
    for name; do
        [[ -n ${!name-} ]] || fail "$name is empty: $(sed -n "s/^$name=[^#]*# //p" "$0"); set it at the top of $0, or in the environment"
    done
}

# need_training: the options of `pathflip train` must be there; only the launcher names folder and processes.
need_training() {
    local option
    [[ ${#OPTIONS[@]} -gt 0 ]] ||
        fail "no options for pathflip train, such as --config align_base --config.data.records=records (see --help)"
    for option in "${OPTIONS[@]}"; do
        [[ $option != --workdir* ]] || fail "$option: the run folder is the setting WORKDIR"
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

# keep_running COMMAND...: run it until it is done, and return its last exit code. What stopped after saving starts
# again as often as it takes; anything else that went wrong (a killed process, a lost host) MAX_RESTARTS times, with
# PAUSE seconds before; wrong input never, and nothing once STOPPING is set.
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
