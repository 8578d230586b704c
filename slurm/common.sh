# Sourced by every job here. Expects to run where `sbatch` was called: the folder with slurm/ in it (the repository, or where `marlora
# slurm init` was run), on a file system that all nodes see.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f slurm/site.env ]; then set -a; . slurm/site.env; set +a; fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-4}}
python=${MARLORA_PYTHON:-.venv/bin/python}
[ -x "$python" ] || { echo "no $python: run make setup here, or set MARLORA_PYTHON in slurm/site.env" >&2; exit 2; }

# program RECIPE: sets `program` to the command that trains it: a file (recipes/grpo_team.py), or what `marlora train` takes (a name, a config).
program() {
    case $1 in
        *.py) program=("$python" "$1") ;;
        *) program=("$python" -m marlora.recipes.cli.main train "$1") ;;
    esac
}

# A port of its own for every job, so that two on one node do not meet.
free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# ranks NODES PROCESSES COMMAND...: one process per rank, with the variables that torch.distributed reads. srun hands signals on to all of them.
ranks() {
    local nodes=$1 processes=$2 first; shift 2
    first=$(scontrol show hostnames "$nodes" | head -n 1)
    export MASTER_ADDR=$first MASTER_PORT
    MASTER_PORT=$(free_port)
    exec srun --overlap --nodelist="$nodes" --nodes="$(scontrol show hostnames "$nodes" | wc -l)" --ntasks="$processes" --kill-on-bad-exit=1 \
        bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank "$@"
}

# or_requeue COMMAND...: runs it; USR1 (before the time limit, see --signal) or TERM (pre-emption) lets it save and end, and puts the
# job back into the queue. A command that ended by itself, well or not, ends the job.
or_requeue() {
    local asked=0 code=0 child
    trap 'asked=1; kill -USR1 "$child" 2>/dev/null || true' USR1 TERM
    "$@" &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
    if [ "$asked" = 1 ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; exit 0; fi
    exit "$code"
}
