#!/usr/bin/env bash
# Trains a small model on the demo's scenes (docs/data.md). Other scripts run it with settings of
# their own:
#     model=aoa save_path=output/demo_aoa bash configs/train_demo.sh --seed 2
# Further arguments are passed on to train.py. The script can be interrupted; running it again
# resumes.
model=${model:-gridtd}                      # or aoa
data=${data:-data}
save_path=${save_path:-output/demo}
. "$(dirname "$0")/environment.sh"

python train.py \
    --dataset demo \
    --data_folder "$data" \
    --model_type "$model" \
    --encoder small \
    --embed_dim 128 \
    --hidden_dim 128 \
    --attention_dim 64 \
    --dropout 0.1 \
    --batch_size 10 \
    --captions_per_epoch 2 \
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
    --save_path "$save_path" \
    "$@"
