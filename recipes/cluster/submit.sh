#!/usr/bin/env bash
# Any mue command on SLURM, one task for each GPU. From the folder that the recipes lie in:
#   sbatch recipes/cluster/submit.sh calibrate -c recipes/flickr8k_caption.yaml --data.train SHARDS
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 recipes/cluster/submit.sh calibrate -c ...
# The same line again goes on where it was; so does a job that SLURM puts back in the queue.
#SBATCH --job-name=mue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mue-%j.log
set -euo pipefail

# The same number on every run: the latency table and the last bits of a sum depend on it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# srun does not take it over from sbatch by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# --kill-on-bad-exit: when one task stops, the others do not wait for it.
srun --kill-on-bad-exit=1 --label mue "$@" -c recipes/cluster/ddp.yaml \
    --trainer.num_nodes "${SLURM_NNODES}" --trainer.devices "${SLURM_NTASKS_PER_NODE}"
