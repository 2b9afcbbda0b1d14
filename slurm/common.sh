# Sourced by slurm/ice_*.sh and scaling.sh. `train CONFIG [ARGUMENT]...` runs pretrain/main.py with one task a GPU, and
# decides by how the ranks ended what becomes of the job (`train_cell SWEEP`: the same for a cell of a sweep, a task of a
# job array each):
#
#   0   finished                     the job ends
#   78  bad configuration or data    the job ends and is never retried
#   75  saved and resumable          the job goes back into the queue, and resumes from its newest checkpoint
#   else                             the same: a crashed or killed rank costs the steps since the last checkpoint
#
# "Back into the queue" holds while the run gets on: when more than ICE_RETRIES starts in a row end without a newer
# committed checkpoint, the job ends (launch/retry_budget.py counts, in RUN/slurm/retries.json). Asked to end by TERM
# (scancel), the ranks save and the job stays ended. When a node dies, Slurm itself requeues the job after it has
# declared the node DOWN.
#
# Five minutes before the time limit Slurm sends USR1 to this shell (--signal=B:USR1@300), which hands it to srun. From
# there it reaches every process of the step: what a rank starts must bear USR1 (W&B's helper does). srun runs in the
# background, because a shell runs its traps only between commands or while it waits.
#
# ICE_ROOT               the checkout; default: the folder that sbatch was called in
# ICE_PYTHON             default: $ICE_ROOT/.venv/bin/python; in a container: python
# ICE_CONTAINER_ARGS     what runs a command in the container, such as (apptainer exec --nv ice.sif)
# ICE_SRUN_ARGS          more arguments of srun, such as (--container-image=ice.sqsh)
#                        Both are arrays set in the script, or come from the environment with one argument a line.
# ICE_INTERFACE          network interface of NCCL's and gloo's sockets, such as ib0
# ICE_RETRIES            starts in a row that may end without a newer checkpoint; default 3
# ICE_WAIT_SECONDS       time that the other ranks have after the first one has ended; default 120
# ICE_NODE_FAIL_SECONDS  time that Slurm has to declare a silent node DOWN; default 1800
# ICE_POLL_SECONDS       how often the step is looked at; default 10

set -euo pipefail

readonly EXIT_FINISHED=0 EXIT_PREEMPTED=75 EXIT_BAD_INPUT=78

srun_pid=""
stop="" # the signal that asked this shell to stop
# How scontrol calls this job alone: the first number of an array also means all of it.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-${SLURM_JOB_ID:-?}}"
interrupted=no # a trap ran while the shell waited for srun

say() {
    printf '%s slurm job %s: %s\n' "$(date '+%F %T')" "$job" "$*" >&2
}

# read_list NAME: make the variable an array, of its lines unless it is one.
read_list() {
    if [[ "$(declare -p "$1" 2>/dev/null)" != "declare -a"* ]]; then
        local text="${!1:-}"
        local -n list="$1"
        list=()
        [[ -z $text ]] || mapfile -t list <<<"$text"
    fi
}

# Defaults of the settings above; refuses what cannot work before anything starts.
read_settings() {
    : "${SLURM_JOB_ID:?is not set: submit this script with sbatch, from the top folder of the checkout}"
    read_list ICE_CONTAINER_ARGS
    read_list ICE_SRUN_ARGS
    ICE_ROOT="${ICE_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
    ICE_RETRIES="${ICE_RETRIES:-3}"
    ICE_WAIT_SECONDS="${ICE_WAIT_SECONDS:-120}"
    ICE_NODE_FAIL_SECONDS="${ICE_NODE_FAIL_SECONDS:-1800}"
    ICE_POLL_SECONDS="${ICE_POLL_SECONDS:-10}"
    cd "$ICE_ROOT"
    if ((${#ICE_CONTAINER_ARGS[@]})); then
        ICE_PYTHON="${ICE_PYTHON:-python}"
    else
        ICE_PYTHON="${ICE_PYTHON:-$ICE_ROOT/.venv/bin/python}"
        if [[ ! -x $ICE_PYTHON ]]; then
            say "error: no $ICE_PYTHON; run 'make setup' in $ICE_ROOT, or set ICE_PYTHON"
            exit "$EXIT_BAD_INPUT"
        fi
        PATH="$(dirname "$ICE_PYTHON"):$PATH" # ninja
        export PATH
    fi
    python=(${ICE_CONTAINER_ARGS[@]+"${ICE_CONTAINER_ARGS[@]}"} "$ICE_PYTHON" -u)
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # since 22.05 srun does not take over sbatch's
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    if [[ -n ${ICE_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME="$ICE_INTERFACE" GLOO_SOCKET_IFNAME="$ICE_INTERFACE"
    fi
}

# Exports MASTER_ADDR and MASTER_PORT. The port follows from the job's number and this start's: the same on all nodes,
# another for the next job and for what a lost node may still run of the last start, and below the range that the
# kernel hands out.
find_rendezvous() {
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    MASTER_ADDR="${hosts%%$'\n'*}"
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 12000))
    export MASTER_ADDR MASTER_PORT
}

forward_stop() {
    interrupted=yes
    [[ $stop == TERM ]] || stop=$1
    say "received $1; asking the ranks to save and stop"
    if [[ -n $srun_pid ]]; then
        kill -USR1 "$srun_pid" 2>/dev/null || true
    fi
}

# Nodes of this job that Slurm has not heard of lately, on one line.
silent_nodes() {
    timeout 60 sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format='%N %T' |
        awk '$2 ~ /\*$|^down|^unknown/ && !seen[$1]++ { printf "%s%s", comma, $1; comma = "," }'
}

# Ends srun when it does not return by itself after ranks have ended. It does not while a node of the step is dead, and
# then neither may this shell: a job that ends before Slurm has declared the node DOWN is not requeued, and one that is
# requeued before starts without its GPUs (Slurm 22.05). So it waits for that, and Slurm ends this shell.
watch_step() {
    local first_end="" silent="" told=""
    while sleep "$ICE_POLL_SECONDS" &>/dev/null; do
        compgen -G "$ended/*" >/dev/null || continue
        : "${first_end:=$SECONDS}"
        # srun's own --wait comes first.
        ((SECONDS - first_end > ICE_WAIT_SECONDS + ICE_WAIT_SECONDS / 2)) || continue
        silent="$(silent_nodes || true)"
        if [[ -n $silent ]] && ((SECONDS - first_end < ICE_NODE_FAIL_SECONDS)); then
            [[ $told == "$silent" ]] || say "no answer from $silent; waiting until Slurm declares it DOWN"
            told="$silent"
            continue
        fi
        say "ranks ended, srun did not; ending it"
        kill -TERM "$srun_pid" 2>/dev/null || true
        sleep $((ICE_WAIT_SECONDS / 4)) &>/dev/null
        kill -KILL "$srun_pid" 2>/dev/null || true
        return
    done
}

# Runs the step; returns what `step_status` makes of how its ranks ended. `--wait` rather than `--kill-on-bad-exit`:
# ranks that end with 75 do so within seconds of each other, and are let finish.
run_step() {
    ended="$run/slurm/start-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    rm -rf "$run"/slurm/start-*
    mkdir -p "$ended"
    # Each task leaves its rank's status: srun, which may have killed ranks, reports only the highest.
    # shellcheck disable=SC2016  # the variables are the task's
    srun --kill-on-bad-exit=0 --wait="$ICE_WAIT_SECONDS" ${ICE_SRUN_ARGS[@]+"${ICE_SRUN_ARGS[@]}"} \
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
            trap : USR1 TERM INT # they are for the rank; this shell outlives it
            ended=$1; shift; status=0
            "$@" || status=$?
            { echo "$status" >"$ended/$RANK"; } 2>/dev/null || true
            exit "$status"' \
        ice "$ended" "${python[@]}" "$@" &
    srun_pid=$!
    watch_step &
    local watch_pid=$! status
    while true; do
        interrupted=no
        status=0
        wait "$srun_pid" || status=$?
        # After a trap, `wait` returns although the step goes on.
        [[ $interrupted == yes ]] || break
    done
    srun_pid=""
    kill "$watch_pid" 2>/dev/null || true
    wait "$watch_pid" 2>/dev/null || true
    step_status "$status"
}

# step_status STATUS: what srun's status means. Its 0 counts when the first rank, which leaves after a barrier, says so
# too: srun also returns 0 after a "Node failure". Otherwise it is what the ranks that were not killed (below 128) agree
# on: one that finds bad input alone speaks for all; one that is killed while the others leave with 75 does not.
step_status() {
    local of_srun=$1 status all_saved=no
    if ((of_srun == EXIT_FINISHED)); then
        [[ "$(cat "$ended/0" 2>/dev/null)" != "$EXIT_FINISHED" ]] || return "$EXIT_FINISHED"
        of_srun=1
    fi
    while read -r status; do
        case $status in
            "$EXIT_BAD_INPUT") return "$EXIT_BAD_INPUT" ;;
            "$EXIT_PREEMPTED") [[ $all_saved == never ]] || all_saved=yes ;;
            *) ((status >= 128)) || all_saved=never ;;
        esac
    done < <(cat "$ended"/* 2>/dev/null)
    [[ $all_saved != yes ]] || return "$EXIT_PREEMPTED"
    return "$of_srun"
}

# ask COMMAND...: a question to Slurm, repeated for a while when its controller does not answer.
ask() {
    local try
    for ((try = 1; try <= 120; try++)); do
        if "$@"; then
            return
        fi
        sleep "$ICE_POLL_SECONDS"
    done
    say "error: '$*' failed $((try - 1)) times"
    return 1
}

# One field of this job, such as JobState, as Slurm has it now.
job_field() {
    ask scontrol show job --oneliner "$job" | tr ' ' '\n' | sed -n "s/^$1=//p"
}

# Whether this start is the one that Slurm knows. A shell that lives on after its node was declared DOWN is not: by then
# the job waits or runs again elsewhere.
is_current() {
    [[ $(job_field JobState) == RUNNING && $(job_field Restarts) == "${SLURM_RESTART_COUNT:-0}" ]]
}

# requeue [NODE,...]: put the job back into the queue, without these nodes.
requeue() {
    local excluded
    excluded="$(job_field ExcNodeList)"
    trap '' TERM USR1 # Slurm ends this shell now, in KillWait seconds at the latest
    ask scontrol requeue "$job"
    if [[ -z ${1:-} ]]; then
        say "back in the queue"
        return
    fi
    # Slurm takes this of a waiting job only, and the next start may be seconds away.
    if [[ $excluded == "(null)" ]]; then
        excluded=""
    fi
    ask scontrol update JobId="$job" ExcNodeList="${excluded:+$excluded,}$1"
    say "back in the queue, without the nodes that failed preflight: $1"
}

train() {
    read_settings
    find_rendezvous
    trap 'forward_stop USR1' USR1
    trap 'forward_stop TERM' TERM
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST," \
        "rendezvous $MASTER_ADDR:$MASTER_PORT, $1"

    local status=0 decision nodes
    local budget=("${python[@]}" launch/retry_budget.py)
    # Checks the configuration too, before any rank starts.
    run="$("${budget[@]}" begin --job "$job" --tasks "$SLURM_NTASKS" --config "$@")" || status=$?
    if ((status != EXIT_FINISHED)); then
        say "error: the configuration was not accepted (above); not retried"
        exit "$status"
    fi
    if [[ -n $stop ]]; then
        status=$EXIT_PREEMPTED # asked to stop before there was anything to save
    else
        run_step pretrain/main.py --config "$@" || status=$?
    fi

    case $status in
        "$EXIT_FINISHED") say "finished" ;;
        "$EXIT_BAD_INPUT") say "error: bad configuration or data (above); not retried" ;;
        *)
            say "training ended with status $status"
            if [[ $stop == TERM ]]; then
                say "TERM ended this start (Slurm has the job as $(job_field JobState))"
            elif ! is_current; then
                say "Slurm has given up on this start; left alone"
            else
                decision="$("${budget[@]}" end --job "$job" --run "$run" --retries "$ICE_RETRIES" \
                    --nodes "$SLURM_JOB_NUM_NODES")" || decision="stop"
                if [[ $decision == retry* ]]; then
                    read -r _ nodes <<<"$decision"
                    requeue "$nodes"
                fi
            fi
            ;;
    esac
    exit "$status"
}

# train_cell SWEEP: train the cell that this task of a job array stands for, unless it is finished. Whoever finishes one
# writes the sweep's results anew.
train_cell() {
    read_settings
    trap 'forward_stop USR1' USR1
    trap 'forward_stop TERM' TERM
    if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
        say "error: not a job array; python launch/sweep.py $1 --executor slurm --dry-run prints the sbatch line"
        exit "$EXIT_BAD_INPUT"
    fi
    local plan status=0 sweep=("${python[@]}" launch/sweep.py "$1")
    plan="$("${sweep[@]}" --cell "$SLURM_ARRAY_TASK_ID")" || status=$?
    if ((status != EXIT_FINISHED)); then
        say "error: the sweep was not accepted (above); not retried"
        exit "$status"
    fi
    if [[ -z $plan ]]; then
        say "the cell is finished"
        exit "$EXIT_FINISHED"
    fi
    # `train` ends this shell.
    collect=("${sweep[@]}" --collect)
    trap '(($? != EXIT_FINISHED)) || "${collect[@]}" >/dev/null || say "error: results not written"' EXIT
    train "$plan"
}
