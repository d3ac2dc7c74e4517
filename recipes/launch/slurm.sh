# shellcheck shell=bash
# What the batch files have in common; they source it. It sets what ranks need to find each other, and has `in_step`.
set -u

# Of the shell of `srun --pty` from which the job was submitted; sbatch hands it on.
unset SLURM_PTY_PORT

if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    echo "error: the job has $SLURM_HET_SIZE heterogeneous components, of which srun starts the first alone: submit it" \
        "with one set of options" >&2
    exit 2
fi

first_host() { # node01 of node[01-03,07],login
    local hosts=$1 names
    if names=$(scontrol show hostnames "$hosts" 2>/dev/null) && [ -n "$names" ]; then
        echo "${names%%$'\n'*}"
        return
    fi
    # Without scontrol, as in some containers: of each bracket the first number, then what comes before a comma.
    while [[ $hosts =~ ^([^[]*)\[([^],-]+)[^]]*\](.*)$ ]]; do
        hosts=${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    done
    echo "${hosts%%,*}"
}

# Rank 0 is on the first node. The port follows from the job, so that jobs on one node have different ones; it is below
# those that Linux gives to outgoing connections.
export MASTER_ADDR="${MASTER_ADDR:-$(first_host "$SLURM_JOB_NODELIST")}"
export MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
gpus=${SLURM_GPUS_ON_NODE:-1} # 0 on a node without: one CPU rank
export RANKS_PER_NODE="${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
if [[ ! $RANKS_PER_NODE =~ ^[1-9][0-9]*$ ]]; then
    echo "error: RANKS_PER_NODE=$RANKS_PER_NODE: allowed is a whole number from 1" >&2
    exit 2
fi

# Else every rank has as many threads as the node has cores. srun does not take over sbatch's --cpus-per-task.
threads=$((${SLURM_CPUS_PER_TASK:-8} * ${SLURM_NTASKS_PER_NODE:-1} / RANKS_PER_NODE))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# NCCL says what went wrong, and takes no interface that other nodes cannot reach. If it finds a wrong one still, name
# the right one (`ip -br address`), for gloo too, which goes by the node's name otherwise:
#     export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# and the InfiniBand cards, if some of them are for storage: export NCCL_IB_HCA=mlx5_0,mlx5_1
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker}"

# in_step [OPTION...] COMMAND...: run the command by srun; if it was stopped before the time limit, have the job queued
# again; end with its status.
in_step() {
    local step status restarts=${SLURM_RESTART_COUNT:-0}
    # One rank's end must not have srun kill another one that still writes: ranks end each other. And srun waits for a
    # node that died until SLURM notices, which then queues the job again; ending earlier would pass for a failure.
    # In the background, since bash acts on a signal between commands only.
    srun --kill-on-bad-exit=0 --wait=0 "$@" &
    step=$!
    trap 'kill -USR1 "$step"' USR1 # srun hands it on to every task
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
    status=$?
    # 138: stopped, with a checkpoint or before training. Nothing else is queued again: a run that fails would for ever.
    if [ "$status" = 138 ]; then
        if [ "$restarts" -ge "${MOST_RESTARTS:-100}" ]; then
            echo "started again $restarts times, which is the most (MOST_RESTARTS): not queued again" >&2
        else
            scontrol requeue "$SLURM_JOB_ID" || echo "the job could not be queued again: submit it once more" >&2
        fi
    fi
    exit "$status"
}
