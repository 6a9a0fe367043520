#!/usr/bin/env bash
# Runs every stage on generated images: data, training, evaluation, explanations and fine-tuning. No
# GPU is needed. The script can be interrupted; running it again resumes.
. "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # the layers are too small for more threads

[ -f data/demo/test_demo.hdf5 ] || python preparedataset.py --dataset demo

model=gridtd bash configs/train_demo.sh

python evaluation.py \
    --weight output/demo/checkpoint_best.pth \
    --dataset demo \
    --explanations correctness \
    --max_images 200 \
    --save_path output/demo

python explain.py \
    --weight output/demo/checkpoint_best.pth \
    --images data/demo/images/test_0000[0-7].png \
    --methods lrp attention \
    --save_path output/demo/explanations

python finetune.py \
    --weight output/demo/checkpoint_best.pth \
    --erase_tune \
    --erase_weight 0.1 \
    --epochs 1 \
    --decoder_lr 5e-4 \
    --lr_schedule cosine \
    --workers 1 \
    --save_path output/demo_finetuned

python evaluation.py \
    --weight output/demo_finetuned/checkpoint_best.pth \
    --dataset demo \
    --save_path output/demo_finetuned

python explain.py \
    --weight output/demo_finetuned/checkpoint_best.pth \
    --images data/demo/images/test_0000[0-7].png \
    --methods lrp attention \
    --save_path output/demo_finetuned/explanations

python studies/before_after/before_after.py output/demo output/demo_finetuned

echo "$PWD/output/demo $PWD/output/demo_finetuned"
