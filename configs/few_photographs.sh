#!/usr/bin/env bash
# Both models on a few photographs of your own in COCO's layout (train2017/, val2017/, annotations/), learnt by heart:
#     bash configs/few_photographs.sh FOLDER [VGG16_WEIGHTS]
# Without a file of weights, ImageNet's are downloaded. Interrupted, it goes on when it is run again.
folder=$(realpath "${1:?give the folder that holds train2017/, val2017/ and annotations/}")
weights=${2:+--encoder_weights $(realpath "$2")}
. "$(dirname "$0")/environment.sh"

python preparedataset.py \
    --dataset coco2017 \
    --annotation_folder "$folder/annotations" \
    --image_folder "$folder" \
    --output_folder data/few \
    --min_word_freq 3 \
    --features cnn \
    --encoder vgg16 \
    $weights

for model in gridtd aoa; do
    python train.py \
        --dataset coco2017 \
        --data_folder data/few \
        --model_type $model \
        --encoder vgg16 \
        $weights \
        --batch_size 10 \
        --epochs 30 \
        --patience 30 \
        --decoder_lr 1e-3 \
        --grad_clip 1 \
        --amp \
        --save_path output/few_$model

    for split in train test; do
        python evaluation.py \
            --weight output/few_$model/checkpoint_last.pth \
            --dataset coco2017 \
            --data_folder data/few \
            --split $split \
            --explanations correctness \
            --methods lrp attention \
            --max_images 40 \
            --save_path output/few_$model
    done

    python explain.py \
        --weight output/few_$model/checkpoint_last.pth \
        --images $(find "$folder/val2017" -name '*.jpg' | sort | head -5) \
        --methods lrp attention \
        --save_path output/few_$model/explanations
done
echo "$PWD/output/few_gridtd $PWD/output/few_aoa"
