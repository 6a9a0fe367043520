#!/usr/bin/env bash
# Runs every stage on generated images: data, training, evaluation, explanations and fine-tuning. No GPU is needed.
# The script can be interrupted; running it again resumes.
. "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # the layers are too small to benefit from more threads

[ -f data/demo/test_demo.hdf5 ] || python preparedataset.py \
    --dataset demo \
    --output_folder data \
    --demo_size 4000 500 500 \
    --bias 0.95 \
    --test_bias 0.5

python train.py \
    --dataset demo \
    --data_folder data \
    --model_type gridtd \
    --encoder small \
    --embed_dim 128 \
    --hidden_dim 128 \
    --attention_dim 64 \
    --dropout 0.1 \
    --batch_size 10 \
    --captions_per_step 2 \
    --epochs 10 \
    --patience 10 \
    --region_epochs 3 \
    --region_loss 1 \
    --decoder_lr 1e-3 \
    --encoder_lr 1e-3 \
    --lr_schedule cosine \
    --grad_clip 1 \
    --amp \
    --workers 1 \
    --save_path output/demo

python evaluation.py \
    --weight output/demo/checkpoint_best.pth \
    --dataset demo \
    --data_folder data \
    --split test \
    --explanations correctness \
    --methods lrp attention \
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
    --data_folder data \
    --split test \
    --save_path output/demo_finetuned

python explain.py \
    --weight output/demo_finetuned/checkpoint_best.pth \
    --images data/demo/images/test_0000[0-7].png \
    --methods lrp attention \
    --save_path output/demo_finetuned/explanations

python studies/before_after.py output/demo output/demo_finetuned

echo "$PWD/output/demo $PWD/output/demo_finetuned"
