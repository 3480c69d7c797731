#!/usr/bin/env bash
# Training on SLURM: sbatch docs/slurm.sh FLAGS, from the repository's folder. Out of time, the job
# saves its state, asks to be queued again, and goes on from there.
#SBATCH --job-name=samed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# USR1 comes to this script 300 s before the time is over (and at a preemption, where SLURM has
# PreemptParameters=send_user_signal): train.py finishes its step and saves, and the job is queued
# again. TERM without USR1 is a scancel, or a preemption with GraceTime: it is passed on, so that the
# state is saved, but nothing is asked for; what is preempted under PreemptMode=REQUEUE, SLURM
# queues again by itself, because of --requeue.
set -u
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds that ranks have to save, within the 300
EXIT_INTERRUPTED=75
RUN=("${SAMED_PYTHON:-.venv/bin/python}")
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then # one torchrun on every machine
    HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    PORT=$((20000 + SLURM_JOB_ID % 10000)) # another job on the machine has another
    RUN=(srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" # which srun does not inherit
         "${RUN[@]}" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES"
         --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" --max_restarts 3 --rdzv_backend c10d
         --rdzv_endpoint "$HOST:$PORT" --rdzv_id "$SLURM_JOB_ID"
         --signals_to_handle SIGTERM,SIGINT,SIGUSR1)
fi
"${RUN[@]}" train.py --resume auto --output output --root_path "${SAMED_DATA:-data/Synapse}" \
    --warmup --AdamW "$@" &
CHILD=$!
ASKED=0 ENDED=0
trap 'SIGNALLED=1 ASKED=1; kill -USR1 $CHILD 2>/dev/null' USR1
trap 'SIGNALLED=1 ENDED=1; kill -TERM $CHILD 2>/dev/null' TERM
SIGNALLED=1
while [ $SIGNALLED -eq 1 ]; do # a signal ends the wait, not the training
    SIGNALLED=0
    wait $CHILD
    CODE=$?
done
if [ $ASKED -eq 1 ] && [ $CODE -ne 0 ] && [ $CODE -ne 2 ]; then
    CODE=$EXIT_INTERRUPTED # torchrun makes it 1; asked before it listens, Python is killed
elif [ $ENDED -eq 1 ]; then
    exit $CODE
fi
if [ $CODE -eq $EXIT_INTERRUPTED ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $CODE
