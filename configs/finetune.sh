#!/usr/bin/env bash
# Fine-tunes a trained model, by default that of configs/train_flickr30k.sh with LRP-inference, and
# scores its captions. Edit the choices below, or set them as variables:
#     model=aoa dataset=coco2017 mode=erase_tune bash configs/finetune.sh
# Arguments are passed on to finetune.py. The script can be interrupted; running it again resumes.
#     mode=lrp_tune         cross-entropy of p and of the LRP-inference prediction p̃
#     mode=erase_tune       cross-entropy; object words are unlearned where their evidence is erased
#     mode=cider_tune       self-critical training with CIDEr-D
#     mode=lrp_cider_tune   the same, with captions sampled by LRP-inference
#     mode=ce_tune          control: cross-entropy, as in training
mode=${mode:-lrp_tune}
model=${model:-gridtd}                      # or aoa
dataset=${dataset:-flickr30k}               # or coco2017
features=${features:-vgg16}                 # as in training
weight=${weight:-output/${model}_${dataset}_$features/checkpoint_best.pth}
epochs=${epochs:-10}
save_path=${save_path:-$(dirname "$weight")_$mode}
. "$(dirname "$0")/environment.sh"

# --erase_keep_weight 0: the rule for the rest of a caption does not suit photographs
# (docs/results.md)
python finetune.py \
    --$mode \
    --weight "$weight" \
    --erase_keep_weight 0 \
    --epochs "$epochs" \
    --decoder_lr 1e-4 \
    --amp \
    --save_path "$save_path" \
    "$@"

python evaluation.py \
    --weight "$save_path/checkpoint_best.pth" \
    --dataset "$dataset" \
    --decoding beam_search \
    --beam_size 3
