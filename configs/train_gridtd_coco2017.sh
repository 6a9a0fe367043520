#!/usr/bin/env bash
# Ada-LSTM (GridTDModel) on COCO2017, with the settings of Sun et al. (2022). Edit the paths and flags below, then run
#     bash configs/train_gridtd_coco2017.sh
# The script can be interrupted; running it again resumes.
. "$(dirname "$0")/environment.sh"

python preparedataset.py \
    --dataset coco2017 \
    --annotation_folder coco/annotations \
    --image_folder coco \
    --output_folder data \
    --min_word_freq 4 \
    --max_len 30 \
    --captions_per_image 5 \
    --features cnn \
    --encoder vgg16

python train.py \
    --dataset coco2017 \
    --data_folder data \
    --model_type gridtd \
    --encoder vgg16 \
    --embed_dim 512 \
    --hidden_dim 512 \
    --attention_dim 196 \
    --batch_size 32 \
    --epochs 20 \
    --patience 6 \
    --decoder_lr 5e-4 \
    --weight_decay 0 \
    --grad_clip 0.1 \
    --ss_prob 0 \
    --amp \
    --resume auto \
    --save_path output/gridtd_coco2017

python evaluation.py \
    --weight output/gridtd_coco2017/checkpoint_best.pth \
    --dataset coco2017 \
    --data_folder data \
    --split test \
    --decoding beam_search \
    --beam_size 3 \
    --save_path output/gridtd_coco2017
