#!/usr/bin/env bash
# Fine-tunes Ada-LSTM (GridTDModel) on COCO2017 after configs/train_gridtd_coco2017.sh. Edit the flags below, then
# run one of (default: lrp_tune)
#     bash configs/finetune_gridtd_coco2017.sh erase_tune        cross-entropy; words without evidence are unlearned
#     bash configs/finetune_gridtd_coco2017.sh lrp_tune          cross-entropy of p and of the LRP-inference p̃
#     bash configs/finetune_gridtd_coco2017.sh cider_tune        self-critical training with CIDEr-D
#     bash configs/finetune_gridtd_coco2017.sh lrp_cider_tune    the same, with captions sampled with LRP-inference
#     bash configs/finetune_gridtd_coco2017.sh ce_tune           control: cross-entropy, as in training
# The script can be interrupted; running it again resumes.
mode=${1:-lrp_tune}
. "$(dirname "$0")/environment.sh"

python finetune.py \
    --$mode \
    --weight output/gridtd_coco2017/checkpoint_best.pth \
    --data_folder data \
    --erase_weight 0.1 \
    --keep_weight 0 \
    --lrp_weight 1 \
    --baseline greedy \
    --samples 1 \
    --batch_size 32 \
    --epochs 10 \
    --patience 6 \
    --decoder_lr 1e-4 \
    --weight_decay 0 \
    --grad_clip 0.1 \
    --amp \
    --resume auto \
    --save_path output/gridtd_coco2017_$mode

python evaluation.py \
    --weight output/gridtd_coco2017_$mode/checkpoint_best.pth \
    --dataset coco2017 \
    --data_folder data \
    --split test \
    --decoding beam_search \
    --beam_size 3 \
    --save_path output/gridtd_coco2017_$mode
