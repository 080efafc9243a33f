#!/bin/bash
# Several nodes under Slurm, one torchrun agent on each: sbatch docs/slurm.sh edm/sample.py --network_pkl base.pkl ...
#SBATCH --job-name=neon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue                # a job that is stopped goes on where it was

set -euo pipefail
port=$((20000 + SLURM_JOB_ID % 20000))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_id="$SLURM_JOB_ID" \
  --rdzv_backend=c10d --rdzv_endpoint="$head:$port" "$@"
