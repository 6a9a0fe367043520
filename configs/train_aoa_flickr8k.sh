#!/usr/bin/env bash
# MH-FC (AOAModel) on Flickr8k. Give the folder of Flickr8k.token.txt and the three lists of images, and that of the images:
#     bash configs/train_aoa_flickr8k.sh ANNOTATIONS IMAGES [VGG16_WEIGHTS]
# VGG16_WEIGHTS: a file with the encoder's weights (default: ImageNet weights, downloaded). The script can be
# interrupted; running it again resumes.
[ -d "${1:-}" ] && [ -d "${2:-}" ] || { echo "error: give the folder of annotations and the folder of images" >&2; exit 2; }
annotations=$(realpath "$1") images=$(realpath "$2")
weights=()
if [ -n "${3:-}" ]; then
    weights=(--encoder_weights "$(realpath "$3")")
fi
. "$(dirname "$0")/environment.sh"

python preparedataset.py \
    --dataset flickr8k \
    --annotation_folder "$annotations" \
    --image_folder "$images" \
    --output_folder data \
    --max_len 20 \
    --features cnn \
    --encoder vgg16 \
    --amp \
    ${weights[@]+"${weights[@]}"}

python train.py \
    --dataset flickr8k \
    --data_folder data \
    --model_type aoa \
    --encoder vgg16 \
    --batch_size 16 \
    --captions_per_step 3 \
    --epochs 10 \
    --patience 10 \
    --decoder_lr 1e-3 \
    --lr_schedule cosine \
    --grad_clip 1 \
    --label_smoothing 0.1 \
    --amp \
    --save_path output/aoa_flickr8k \
    ${weights[@]+"${weights[@]}"}

python evaluation.py \
    --weight output/aoa_flickr8k/checkpoint_best.pth \
    --dataset flickr8k \
    --data_folder data \
    --split test \
    --decoding beam_search \
    --beam_size 3 \
    --save_path output/aoa_flickr8k
