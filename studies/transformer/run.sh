#!/usr/bin/env bash
# Trains a small ViT with GPT-2 on the demo's scenes with three seeds, and measures its explanations.
# If interrupted, run it again: it resumes.
. "$(dirname "$0")/../../configs/environment.sh"
export OMP_NUM_THREADS=1

[ -f data/demo/test_demo.hdf5 ] || python preparedataset.py --dataset demo

for seed in ${SEEDS:-1 2 3}; do
    model=output/transformer_$seed
    [ -f $model/preprocessor_config.json ] || python studies/transformer/train.py \
        --seed $seed \
        --save_path $model
    # evaluation.py writes metrics_test.json last: what is newer than the model is finished
    [ $model/scores/metrics_test.json -nt $model/model.safetensors ] || python evaluation.py \
        --weight $model \
        --dataset demo \
        --max_len 20 \
        --explanations correctness pointing_game deletion_insertion \
        --max_images 200 \
        --methods lrp lrp_gamma attn_lrp gradient grad_cam attention random \
        --calibrate \
        --save_path $model/scores
done
