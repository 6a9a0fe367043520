#!/usr/bin/env bash
# Trains on several machines (nodes), with one process per GPU. Start the same command on every node:
#     NODES=2 GPUS=4 HEAD=node1:29500 bash configs/train_multi_node.sh
# NODES: number of nodes; GPUS: number of GPUs of each; HEAD: host and free port of any one of them. All nodes need the
# repository, data/ and output/ in a shared folder. --batch_size counts the images of all processes together. If a node
# fails, all stop; the same command resumes, also with another number of nodes or GPUs.
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
    --encoder vgg16 \
    --batch_size 256 \
    --amp \
    --workers 8 \
    --save_path output/aoa_coco2017 \
    "$@"
