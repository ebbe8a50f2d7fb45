#!/usr/bin/env bash
# Train on several nodes under Slurm, from the root of the project:
#
#     sbatch launch/slurm.sh @configs/gpt2_124M.txt --log_dir log
#
# --resume is always on: the first start finds no checkpoint and begins at step 0. All nodes need the data; the
# log directory must be on a shared disk, because after a requeue another node may be the first. If a process
# fails, all nodes start again from the newest checkpoint. If a node goes down, Slurm queues the job again, and
# so does this script before the time limit, once the run has saved.
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store for each start: kit/ranks.py
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds that torchrun gives its ranks to save
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}  # another job may share the node
ranks=${SLURM_GPUS_ON_NODE:-1}
starts=0 quick=0 warned= step=
trap 'warned=1; kill -TERM $step' USR1  # srun passes SIGTERM to each torchrun, which passes it to its ranks

# stop after three failures in a row, each within ten minutes: probably a wrong flag, which a new start can't
# fix. Ten minutes, because a start can be slow: importing torch from a shared disk, checking the shards
while [ -z "$warned" ] && [ $quick -lt 3 ]; do
    starts=$((starts + 1)) SECONDS=0
    # since Slurm 22.05, srun does not take this number from sbatch, and gives a task one core by default
    srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$ranks" \
        --rdzv_backend=c10d --rdzv_endpoint="$host:$port" --rdzv_id="$SLURM_JOB_ID.$starts" \
        train_gpt2.py --resume "$@" &
    step=$!
    wait $step && exit 0
    wait $step && exit 0  # a signal ends the first wait; the run saves its checkpoint meanwhile
    [ $SECONDS -lt 600 ] && quick=$((quick + 1)) || quick=0
    echo "start $starts failed after $SECONDS seconds"
    [ -n "$warned" ] || sleep "${PAUSE:-10}"
done
[ -n "$warned" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit 1
