#!/usr/bin/env bash
# Evaluates the explanation methods of both models on the demo's test images. Run `bash
# configs/demo.sh` first, which prepares them; this script trains both models with the settings of
# configs/train_demo.sh and runs every experiment. If interrupted, run it again: it resumes.
. "$(dirname "$0")/../../configs/environment.sh"
export OMP_NUM_THREADS=1
methods="lrp gradient grad_cam guided_backprop guided_grad_cam attention random"
experiments="ablation correctness tpfp deletion_insertion pointing_game mask_mass"

for model in gridtd aoa; do
    model=$model save_path=output/demo_$model bash configs/train_demo.sh
done

for model in demo_gridtd demo_aoa; do
    weight=output/$model/checkpoint_best.pth
    # evaluation.py writes metrics_test.json last: what is newer than the checkpoint is finished
    [ output/$model/scores/metrics_test.json -nt $weight ] || python evaluation.py \
        --weight $weight \
        --dataset demo \
        --explanations $experiments \
        --methods $methods \
        --save_path output/$model/scores
    [ output/$model/sanity/metrics_test.json -nt $weight ] || python evaluation.py \
        --weight $weight \
        --dataset demo \
        --explanations sanity \
        --methods $methods \
        --max_images 100 \
        --save_path output/$model/sanity
done
