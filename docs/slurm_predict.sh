#!/usr/bin/env bash
# Segment many scans on SLURM, several at a time:
#   sbatch docs/slurm_predict.sh --input scans --output segmented --lora_ckpt adapter.pth
# in the repository's folder. Every job of the array takes a share of the scans (--part) on one GPU;
# all write into one folder. A job that has ended frees its GPU, so that unequal shares waste
# nothing. When its time is over it queues itself again, as docs/slurm.sh does, and goes on with the
# scans that are left. Every job writes the tables of what is there; the last one is complete.
#SBATCH --job-name=samed-predict
#SBATCH --array=1-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -u
export SAMED_PROGRAM=predict.py
exec bash docs/slurm.sh "$@"
