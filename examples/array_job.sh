#!/bin/bash
# A job array of SLURM that splits one fingpt command among its jobs, and, without an array, their merge:
#   jobs=$(sbatch --parsable --array=1-8 examples/array_job.sh label ... --output labelled.csv)
#   sbatch --dependency=afterok:$jobs --gpus=0 examples/array_job.sh label ... --output labelled.csv
# Some jobs again, where the array would not say how many there are: SHARDS=8 sbatch --array=3,5 ...
#SBATCH --job-name=fingpt
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export HF_HUB_OFFLINE=1

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  exec fingpt "$@" --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}"
fi
exec fingpt "$@" --merge ${SHARDS:+"$SHARDS"}
