# Sourced by slurm/ice_*.sh. `train CONFIG [ARGUMENT]...` runs pretrain/main.py with one task a GPU, and decides by its
# exit status what becomes of the job:
#
#   0   finished                     the job ends
#   75  preempted, saved, resumable  the job is put back into the queue, and resumes from its checkpoint
#   78  bad configuration or data    the job ends and is never retried
#   else                             the job ends with that status (Slurm itself requeues after a node failure)
#
# Five minutes before the time limit Slurm sends USR1 to this shell only (--signal=B:USR1@300): sent to the whole step,
# it would also reach data workers, and end those that have no handler. The shell hands it to srun, and srun to the
# ranks. srun runs in the background, because a shell runs its traps only between commands or while it waits.
#
# ICE_ROOT    the checkout; default: the folder that sbatch was called in
# ICE_PYTHON  default: $ICE_ROOT/.venv/bin/python
# ICE_MAX_RESTARTS  give up after so many restarts, so that a job that never gets on does not go round for ever

set -euo pipefail

ICE_ROOT="${ICE_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
ICE_PYTHON="${ICE_PYTHON:-$ICE_ROOT/.venv/bin/python}"
ICE_MAX_RESTARTS="${ICE_MAX_RESTARTS:-500}"

readonly EXIT_FINISHED=0 EXIT_PREEMPTED=75 EXIT_BAD_INPUT=78

srun_pid=""
signalled=no

say() {
    printf '%s slurm job %s: %s\n' "$(date '+%F %T')" "${SLURM_JOB_ID:-?}" "$*" >&2
}

# Exports MASTER_ADDR and MASTER_PORT. The port follows from the job's number: the same on all nodes, another for the next
# job on them, and below the range that the kernel hands out.
find_rendezvous() {
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    MASTER_ADDR="${hosts%%$'\n'*}"
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
    export MASTER_ADDR MASTER_PORT
}

forward_stop() {
    signalled=yes
    say "received $1; asking the ranks to save and stop"
    if [[ -n $srun_pid ]]; then
        kill -USR1 "$srun_pid" 2>/dev/null || true
    fi
}

# Runs the step and returns its status, the highest of its tasks'. `--wait` rather than `--kill-on-bad-exit`: ranks that
# end with 75 do so within seconds of each other, and a rank that were killed meanwhile would turn 75 into 143.
run_step() {
    # shellcheck disable=SC2016  # the variables are the task's
    srun --kill-on-bad-exit=0 --wait=120 --unbuffered \
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"' \
        ice "$ICE_PYTHON" -u "$@" &
    srun_pid=$!
    local status
    while true; do
        signalled=no
        status=0
        wait "$srun_pid" || status=$?
        # After a trap, `wait` returns although the step goes on.
        [[ $signalled == yes ]] || break
    done
    srun_pid=""
    return "$status"
}

train() {
    : "${SLURM_JOB_ID:?is not set: submit this script with sbatch, from the top folder of the checkout}"
    cd "$ICE_ROOT"
    if [[ ! -x $ICE_PYTHON ]]; then
        say "error: no $ICE_PYTHON; run 'make setup' in $ICE_ROOT, or set ICE_PYTHON"
        exit "$EXIT_BAD_INPUT"
    fi
    PATH="$(dirname "$ICE_PYTHON"):$PATH"
    export PATH OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    find_rendezvous
    trap 'forward_stop USR1' USR1
    trap 'forward_stop TERM' TERM

    say "start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks, rendezvous $MASTER_ADDR:$MASTER_PORT, $1"
    local status=0
    run_step pretrain/main.py --config "$@" || status=$?

    case $status in
        "$EXIT_FINISHED") say "finished" ;;
        "$EXIT_PREEMPTED")
            if ((${SLURM_RESTART_COUNT:-0} >= ICE_MAX_RESTARTS)); then
                say "error: stopped after $ICE_MAX_RESTARTS restarts; raise ICE_MAX_RESTARTS and submit again to go on"
                exit "$status"
            fi
            say "preempted and saved; back into the queue"
            trap '' TERM USR1
            scontrol requeue "$SLURM_JOB_ID"
            ;;
        "$EXIT_BAD_INPUT") say "error: bad configuration or data (above); not retried" ;;
        *) say "error: training ended with status $status" ;;
    esac
    exit "$status"
}
