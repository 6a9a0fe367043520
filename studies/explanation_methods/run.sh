#!/usr/bin/env bash
# Evaluates the explanation methods of both models on the demo's test images. Run `bash
# configs/demo.sh` first, which prepares them; this script trains both models with the settings of
# configs/train_demo.sh and runs every experiment. If interrupted, run it again: it resumes.
. "$(dirname "$0")/../../configs/environment.sh"
export OMP_NUM_THREADS=1

evaluate() {    # arguments: folder of a model, name of the results in it, flags
    # evaluation.py writes metrics_test.json last: what is newer than the checkpoint is finished
    [ "$1/$2/metrics_test.json" -nt "$1/checkpoint_best.pth" ] || python evaluation.py \
        --weight "$1/checkpoint_best.pth" \
        --dataset demo \
        --methods lrp gradient grad_cam guided_backprop guided_grad_cam attention random \
        --save_path "$1/$2" \
        --explanations "${@:3}"
}

for model in gridtd aoa; do
    folder=output/demo_$model
    model=$model save_path=$folder bash configs/train_demo.sh
    evaluate $folder scores ablation correctness tpfp deletion_insertion pointing_game mask_mass
    evaluate $folder sanity sanity --max_images 100
done
