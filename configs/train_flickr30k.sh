#!/usr/bin/env bash
# Trains a model on Flickr30K with the settings of Sun et al. (2022), which are the defaults of
# train.py. Edit the choices below, or set them as variables:
#     model=aoa features=bottom_up bash configs/train_flickr30k.sh
# Arguments are passed on to train.py. The script can be interrupted; running it again resumes.
dataset=${dataset:-flickr30k}             # train_coco2017.sh sets another
model=${model:-gridtd}                      # or aoa
features=${features:-vgg16}                 # a CNN, or bottom_up: regions of an object detector
annotations=${annotations:-dataset_flickr30k.json}     # Karpathy's file (docs/data.md)
images=${images:-flickr30k_images}
epochs=${epochs:-$([ "$model" = aoa ] && echo 50 || echo 20)}
save_path=${save_path:-output/${model}_${dataset}_$features}
. "$(dirname "$0")/environment.sh"

kind=(--features cnn --encoder "$features")
attention_dim=196                           # of gridtd: the number of regions
if [ "$features" = bottom_up ]; then
    # or, with features computed by other software: --bottom_up FILE.tsv
    kind=(--features bottom_up --detector fasterrcnn_resnet50_fpn_v2 --regions 36)
    attention_dim=36
fi
# COCO's annotations are a folder, others are in a file of Karpathy's
given=--karpathy_json
[ "$dataset" != coco2017 ] || given=--annotation_folder

python preparedataset.py \
    --dataset $dataset \
    $given "$annotations" \
    --image_folder "$images" \
    "${kind[@]}"

python train.py \
    --dataset $dataset \
    --model_type "$model" \
    --encoder "$features" \
    --attention_dim "$attention_dim" \
    --epochs "$epochs" \
    --amp \
    --save_path "$save_path" \
    "$@"

python evaluation.py \
    --weight "$save_path/checkpoint_best.pth" \
    --dataset $dataset \
    --decoding beam_search \
    --beam_size 3
