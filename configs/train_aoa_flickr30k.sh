#!/usr/bin/env bash
# MH-FC (AOAModel) on Flickr30K, with the settings of Sun et al. (2022). Edit the paths and flags below, then run
#     bash configs/train_aoa_flickr30k.sh
# The script can be interrupted; running it again resumes.
. "$(dirname "$0")/environment.sh"

python preparedataset.py \
    --dataset flickr30k \
    --karpathy_json dataset_flickr30k.json \
    --image_folder flickr30k_images \
    --output_folder data \
    --min_word_freq 3 \
    --max_len 50 \
    --captions_per_image 5 \
    --features cnn \
    --encoder vgg16

python train.py \
    --dataset flickr30k \
    --data_folder data \
    --model_type aoa \
    --encoder vgg16 \
    --embed_dim 512 \
    --hidden_dim 512 \
    --num_head 8 \
    --batch_size 32 \
    --epochs 50 \
    --patience 6 \
    --decoder_lr 5e-4 \
    --weight_decay 0 \
    --grad_clip 0.1 \
    --ss_prob 0 \
    --amp \
    --resume auto \
    --save_path output/aoa_flickr30k

python evaluation.py \
    --weight output/aoa_flickr30k/checkpoint_best.pth \
    --dataset flickr30k \
    --data_folder data \
    --split test \
    --decoding beam_search \
    --beam_size 3 \
    --save_path output/aoa_flickr30k
