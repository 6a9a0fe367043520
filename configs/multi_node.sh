#!/usr/bin/env bash
# Trains on several machines (nodes), with one process per GPU. All nodes need the repository, data/
# (run preparedataset.py first, on one of them) and output/ in a shared folder. Start the same
# command on every node:
#     NODES=2 GPUS=4 HEAD=node1:29500 bash configs/multi_node.sh
# NODES: number of nodes; GPUS: number of GPUs of each; HEAD: host and free port of any one of them.
# With SLURM, from the repository: sbatch configs/multi_node.sh (edit the lines #SBATCH below).
# Before the time limit ends, SLURM sends SIGTERM to the processes, which write a checkpoint. If a
# node fails, all stop; the same command resumes, also with another number of nodes or GPUs.
# --batch_size counts the images of all processes together. Arguments are passed on to train.py.
#SBATCH --job-name=captioning
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${HEAD:-}" ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export NODES=$SLURM_NNODES GPUS=$SLURM_GPUS_ON_NODE RUN_ID=$SLURM_JOB_ID HEAD=$first:29500
    exec srun bash configs/multi_node.sh "$@"
fi
. "$(dirname "$0")/environment.sh"

torchrun \
    --nnodes "$NODES" \
    --nproc_per_node "$GPUS" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD" \
    --rdzv_id "${RUN_ID:-captioning}" \
    train.py \
    --dataset coco2017 \
    --model_type aoa \
    --batch_size 256 \
    --amp \
    --workers 8 \
    --save_path output/aoa_coco2017_vgg16 \
    "$@"
