#!/usr/bin/env bash
# Trains a model on Flickr8k, with settings of our own (docs/results.md). Give the folder of
# Flickr8k.token.txt and the three lists of images, and that of the images:
#     model=aoa bash configs/train_flickr8k.sh ANNOTATIONS IMAGES [ENCODER_WEIGHTS]
# ENCODER_WEIGHTS: a file with the encoder's weights (default: ImageNet weights, downloaded). The
# script can be interrupted; running it again resumes.
model=${model:-gridtd}                      # or aoa
encoder=${encoder:-vgg16}                   # or efficientnet_lite0, …
epochs=${epochs:-10}
save_path=${save_path:-output/${model}_flickr8k}

if [ ! -d "${1:-}" ] || [ ! -d "${2:-}" ]; then
    echo "error: give the folder of annotations and the folder of images" >&2
    exit 2
fi
annotations=$(realpath "$1")
images=$(realpath "$2")
weights=()
if [ -n "${3:-}" ]; then
    weights=(--encoder_weights "$(realpath "$3")")
fi
. "$(dirname "$0")/environment.sh"

python preparedataset.py \
    --dataset flickr8k \
    --annotation_folder "$annotations" \
    --image_folder "$images" \
    --max_len 20 \
    --features cnn \
    --encoder "$encoder" \
    --amp \
    ${weights[@]+"${weights[@]}"}

python train.py \
    --dataset flickr8k \
    --model_type "$model" \
    --encoder "$encoder" \
    --batch_size 16 \
    --captions_per_epoch 3 \
    --epochs "$epochs" \
    --patience "$epochs" \
    --decoder_lr 1e-3 \
    --lr_schedule cosine \
    --grad_clip 1 \
    --label_smoothing 0.1 \
    --amp \
    --save_path "$save_path" \
    ${weights[@]+"${weights[@]}"}

python evaluation.py \
    --weight "$save_path/checkpoint_best.pth" \
    --dataset flickr8k \
    --decoding beam_search \
    --beam_size 3
