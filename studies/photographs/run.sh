#!/usr/bin/env bash
# Trains and explains both models on a few photographs in COCO's layout (train2017/, val2017/,
# annotations/), which the models memorise:
#     bash studies/photographs/run.sh FOLDER [VGG16_WEIGHTS]
# VGG16_WEIGHTS: a file with the encoder's weights (default: ImageNet weights, downloaded). Run the
# script again to resume an interrupted run.
for part in train2017 val2017 annotations; do
    if [ ! -d "${1:-}/$part" ]; then
        echo "error: give a folder that contains train2017/, val2017/ and annotations/" >&2
        exit 2
    fi
done
folder=$(realpath "$1")
weights=()
if [ -n "${2:-}" ]; then
    weights=(--encoder_weights "$(realpath "$2")")
fi
. "$(dirname "$0")/../../configs/environment.sh"

python preparedataset.py \
    --dataset coco2017 \
    --annotation_folder "$folder/annotations" \
    --image_folder "$folder" \
    --output_folder data/few \
    --min_word_freq 3 \
    --features cnn \
    ${weights[@]+"${weights[@]}"}

train_images=("$folder"/train2017/*.jpg)
test_images=("$folder"/val2017/*.jpg)
for model in gridtd aoa; do
    python train.py \
        --dataset coco2017 \
        --data_folder data/few \
        --model_type $model \
        --batch_size 10 \
        --epochs 30 \
        --patience 30 \
        --decoder_lr 1e-3 \
        --grad_clip 1 \
        --amp \
        --save_path output/few_$model \
        ${weights[@]+"${weights[@]}"}

    python explain.py \
        --weight output/few_$model/checkpoint_last.pth \
        --images "${train_images[@]:0:5}" "${test_images[@]:0:5}" \
        --methods lrp attention \
        --save_path output/few_$model/explanations

    for split in train test; do
        python evaluation.py \
            --weight output/few_$model/checkpoint_last.pth \
            --dataset coco2017 \
            --data_folder data/few \
            --split $split \
            --explanations correctness \
            --max_images 20 \
            --save_path output/few_$model
    done
done
echo "$PWD/output/few_gridtd $PWD/output/few_aoa"
