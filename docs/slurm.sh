#!/usr/bin/env bash
# Train on SLURM: `sbatch docs/slurm.sh FLAGS` in the repository's folder. When its time is over, the
# job saves its state, queues itself again, and continues from there.
#SBATCH --job-name=samed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# SLURM sends USR1 to this script 300 s before the time is over, and at a preemption if it runs with
# PreemptParameters=send_user_signal. train.py then finishes its step and saves, and the job is queued
# again. TERM without USR1 means scancel, or a preemption with GraceTime: the state is saved, but the
# job is not queued here. Under PreemptMode=REQUEUE, SLURM queues it again itself because of --requeue.
set -u
# Seconds that the ranks have to save, within the 300.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
EXIT_INTERRUPTED=75
RUN=("${SAMED_PYTHON:-.venv/bin/python}")
# On several machines, start one torchrun on each.
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Jobs on the same machine need different ports. srun does not inherit --cpus-per-task.
    PORT=$((20000 + SLURM_JOB_ID % 10000))
    RUN=(srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}"
         "${RUN[@]}" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES"
         --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" --max_restarts 3 --rdzv_backend c10d
         --rdzv_endpoint "$HOST:$PORT" --rdzv_id "$SLURM_JOB_ID"
         --signals_to_handle SIGTERM,SIGINT,SIGUSR1)
fi
PROGRAM=(train.py --resume auto --output output --root_path "${SAMED_DATA:-data/Synapse}"
         --warmup --AdamW)
# docs/slurm_ablate.sh and docs/slurm_predict.sh name another program, which goes on by itself. Every
# job of their array takes a share.
if [ -n "${SAMED_PROGRAM:-}" ]; then
    PART=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1} + 1))
    if [ "$PART" -gt "$SLURM_ARRAY_TASK_COUNT" ]; then
        echo "error: the array has gaps, so its jobs have no shares; use --array=1-N" >&2
        exit 2
    fi
    PROGRAM=("$SAMED_PROGRAM" --part "$PART/$SLURM_ARRAY_TASK_COUNT")
fi
"${RUN[@]}" "${PROGRAM[@]}" "$@" &
CHILD=$!
ASKED=0 ENDED=0
trap 'SIGNALLED=1 ASKED=1; kill -USR1 $CHILD 2>/dev/null' USR1
trap 'SIGNALLED=1 ENDED=1; kill -TERM $CHILD 2>/dev/null' TERM
SIGNALLED=1
# A signal ends `wait`, but not the training.
while [ $SIGNALLED -eq 1 ]; do
    SIGNALLED=0
    wait $CHILD
    CODE=$?
done
if [ $ASKED -eq 1 ] && [ $CODE -ne 0 ] && [ $CODE -ne 2 ]; then
    # torchrun turns the code into 1, and Python is killed if the signal comes before it listens.
    CODE=$EXIT_INTERRUPTED
elif [ $ENDED -eq 1 ]; then
    exit $CODE
fi
if [ $CODE -eq $EXIT_INTERRUPTED ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $CODE
