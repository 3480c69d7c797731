#!/usr/bin/env bash
# Run a table of ablations on SLURM, several runs at a time:
#   sbatch docs/slurm_ablate.sh ablations/rank.toml --output output/rank
# in the repository's folder. Every job of the array takes a share of the runs (--part), one at a
# time, on one GPU. When its time is over it saves, queues itself again, and goes on, as
# docs/slurm.sh does. Every job writes the table of what is there; the last one is complete.
# SAMED_DATA names the prepared data.
#SBATCH --job-name=samed-ablate
#SBATCH --array=1-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -u
export SAMED_PROGRAM=ablate.py
exec bash docs/slurm.sh --root_path "${SAMED_DATA:-data/Synapse}" "$@"
