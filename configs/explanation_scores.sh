#!/usr/bin/env bash
# Which explanation tells the truth? Both models on the demo's test pictures, after `bash configs/demo.sh`: trains aoa
# as that trained gridtd, then scores every explanation. Interrupted, it goes on when it is run again.
. "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS=1

python train.py \
    --dataset demo \
    --data_folder data \
    --model_type aoa \
    --encoder small \
    --embed_dim 128 \
    --hidden_dim 128 \
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
    --save_path output/demo_aoa

for model in demo demo_aoa; do
    python evaluation.py \
        --weight output/$model/checkpoint_best.pth \
        --dataset demo \
        --explanations ablation correctness tpfp deletion_insertion pointing_game mask_mass \
        --methods lrp gradient grad_cam guided_backprop guided_grad_cam attention random \
        --save_path output/$model/scores
    python evaluation.py \
        --weight output/$model/checkpoint_best.pth \
        --dataset demo \
        --explanations sanity \
        --methods lrp gradient grad_cam guided_backprop guided_grad_cam attention random \
        --max_images 100 \
        --save_path output/$model/sanity
done
