#!/usr/bin/env bash
# Training on SLURM: sbatch docs/slurm.sh, from the repository's folder. Preempted or out of time,
# the job saves its state, asks to be queued again, and goes on from there.
#SBATCH --job-name=samed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# The signal goes to this script 300 s before the end; train.py finishes its step and saves.
set -u
TRAIN=(${SAMED_PYTHON:-.venv/bin/python} train.py --resume auto --output output
       --root_path "${SAMED_DATA:-data/Synapse}" --warmup --AdamW)
EXIT_INTERRUPTED=75

if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then # one torchrun on every machine
    HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    TRAIN=(srun .venv/bin/torchrun --nnodes "$SLURM_JOB_NUM_NODES"
           --nproc_per_node "$SLURM_GPUS_ON_NODE" --rdzv_backend c10d --rdzv_endpoint "$HOST:29500"
           --rdzv_id "$SLURM_JOB_ID" --signals_to_handle SIGTERM,SIGINT,SIGUSR1 "${TRAIN[@]:1}")
fi
"${TRAIN[@]}" "$@" &
CHILD=$!
ASKED=0
trap 'ASKED=1; kill -USR1 $CHILD' USR1 TERM
wait $CHILD
CODE=$?
while kill -0 $CHILD 2>/dev/null; do # the signal ended the wait, not the training
    wait $CHILD
    CODE=$?
done
if [ $CODE -eq $EXIT_INTERRUPTED ] || [ $ASKED -eq 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $CODE
