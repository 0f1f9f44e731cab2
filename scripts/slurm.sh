#!/usr/bin/env bash
# A run under Slurm, on one machine or several. Started by hand it submits itself; inside the job it is the job.
#   DPSRL_NODES=2 DPSRL_GPUS=8 bash scripts/slurm.sh +recipe=math rollout.num_workers=8 trainer.num_workers=8
# docs/launch.md has the variables. What belongs to a cluster is told to sbatch in its own: SBATCH_PARTITION,
# SBATCH_ACCOUNT, SBATCH_TIMELIMIT. Warned of its end, the job saves and puts itself back into the queue.
set -euo pipefail

UNFINISHED=75 # of scripts/launch.py: asked to stop, saved, to be started again
KILLED=143    # by the same signal, before Python could take it

say() { printf 'slurm: %s\n' "$*" >&2; }

submit() {
    local gpus=()
    [ "${DPSRL_GPUS:-8}" = 0 ] || gpus=(--gpus-per-node="${DPSRL_GPUS:-8}")
    export DPSRL_ROOT="$root" SBATCH_SIGNAL="${SBATCH_SIGNAL:-B:TERM@600}"
    exec sbatch --job-name=dpsrl --nodes="${DPSRL_NODES:-1}" --ntasks-per-node=1 "${gpus[@]}" --exclusive --mem=0 \
        --requeue --open-mode=append --output=slurm-%j.log "$0" "$@"
}

# Of this checkout, or of the image where that is one for apptainer.
set_commands() {
    python=("${PYTHON:-$root/.venv/bin/python}")
    launch=("${python[@]}" "$root/scripts/launch.py")
    if [[ "${DPSRL_IMAGE:-}" == *.sif ]]; then
        export HF_HOME="${HF_HOME:-$PWD/hf}" # the image's own cannot be written to
        mkdir -p "$HF_HOME"
        python=(apptainer exec --nv --bind "$PWD,$runs,$HF_HOME" --env "HF_HOME=$HF_HOME" --pwd "$PWD" "$DPSRL_IMAGE" python)
        launch=("${python[@]}" /opt/dpsrl/scripts/launch.py)
    fi
}

# Nobody else may join this Ray or send it code: a token that only this user's processes can read, new for each start.
make_token() {
    export RAY_AUTH_TOKEN_PATH="$runs/.ray-token-$SLURM_JOB_ID"
    rm -f "$RAY_AUTH_TOKEN_PATH"
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
}

clean_up() {
    [ -z "$workers" ] || kill "$workers" 2>/dev/null || true
    wait
    workers=""
    rm -f "$runs/.ray-token-$SLURM_JOB_ID"
}

# This shell is on the first machine, which becomes the head; srun brings in the others.
start() {
    local role=()
    if [ "$DPSRL_NODES" -gt 1 ]; then
        make_token
        role=(head)
        DPSRL_ADDRESS="$("${python[@]}" -c 'import ray; print(ray.util.get_node_ip_address())'):$((20000 + SLURM_JOB_ID % 12000))"
        export DPSRL_ADDRESS
        # All cores of each machine for the one task that Ray is, which Slurm would else bind to a single one.
        srun --nodes=$((DPSRL_NODES - 1)) --ntasks=$((DPSRL_NODES - 1)) --relative=1 --cpu-bind=none --kill-on-bad-exit=0 \
            "${launch[@]}" worker &
        workers=$!
    fi
    "${launch[@]}" "${role[@]}" "$@" &
    driver=$!
    [ -z "$warned" ] || kill -TERM "$driver"
}

# The driver is told once: a second signal would end it at once.
warn() {
    interrupted=yes
    [ -n "$warned" ] || [ -z "$driver" ] || kill -TERM "$driver" || true
    warned=yes
}

# Ends with the driver's exit code; a signal ends `wait` before its time.
attend() {
    local code=0
    interrupted=yes
    while [ -n "$interrupted" ]; do
        interrupted=""
        code=0
        wait "$driver" || code=$?
    done
    return "$code"
}

job() {
    local code=0
    export DPSRL_NODES="${SLURM_JOB_NUM_NODES:-1}"
    export DPSRL_RUN_DIR="${DPSRL_RUN_DIR:-runs/slurm-$SLURM_JOB_ID}" # a job keeps its number when it is put back
    mkdir -p "$(dirname "$DPSRL_RUN_DIR")"
    runs="$(cd "$(dirname "$DPSRL_RUN_DIR")" && pwd)"
    driver="" workers="" warned=""
    set_commands
    trap clean_up EXIT
    trap warn TERM
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $DPSRL_NODES machines, run folder $DPSRL_RUN_DIR"
    start "$@"
    attend || code=$?
    clean_up # before the job is put back, which ends this shell
    if [ "$code" = "$UNFINISHED" ] || [ "$code" = "$KILLED" ]; then
        say "asked to stop; putting the job back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && code=0
    fi
    exit "$code"
}

if [ -n "${SLURM_JOB_ID:-}" ]; then
    root="${DPSRL_ROOT:-$SLURM_SUBMIT_DIR}" # Slurm runs a copy of this file, from a folder of its own
    job "$@"
else
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    submit "$@"
fi
