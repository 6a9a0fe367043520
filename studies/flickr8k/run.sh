#!/usr/bin/env bash
# Experiments like the paper's, and evidence erasure, on Flickr8k, after configs/train_flickr8k.sh
# for both models: fine-tunes them in every mode with three random seeds, scores the captions and
# measures the explanations. If interrupted, run it again: it resumes. Settings (defaults shown;
# JOBS: runs at the same time):
#     export MODELS="gridtd aoa" MODES="ce erase lrp cider lrp_cider" SEEDS="1 2 3" EPOCHS=1 JOBS=1
#     bash studies/flickr8k/run.sh
# A variant of a mode with other flags, beside the existing runs:
#     export SEEDS=1 MODES=cider NAME=_mean EPOCHS=5 FLAGS="--baseline mean --samples 5"
#     bash studies/flickr8k/run.sh
. "$(dirname "$0")/../../configs/environment.sh"
export OUT=${OUT:-output/flickr8k}
export DATA=${DATA:-data}
export MODES=${MODES:-ce erase lrp cider lrp_cider}
export EPOCHS=${EPOCHS:-1}
export NAME=${NAME:-}
export FLAGS=${FLAGS:-}

evaluate() {    # arguments: checkpoint, folder of results
    [ -f "$2/metrics_test.json" ] || python evaluation.py \
        --weight "$1" \
        --dataset flickr8k \
        --data_folder "$DATA" \
        --decoding beam_search \
        --beam_size 3 \
        --workers 1 \
        --save_path "$2"
}

finetune() {    # arguments: model type, random seed
    local base=output/$1_flickr8k run=$OUT/$1_$2
    mkdir -p "$run"
    exec >>"$run/output.txt" 2>&1
    evaluate "$base/checkpoint_best.pth" "$run/base"
    local mu=0.1        # as in studies/hallucination/run.sh
    [[ $1 == aoa ]] && mu=0.3
    for mode in $MODES; do
        local lr=1e-4
        [[ $mode == *cider ]] && lr=5e-5
        python finetune.py \
            --weight "$base/checkpoint_best.pth" \
            --${mode}_tune \
            --erase_weight $mu \
            --erase_keep_weight 0 \
            --data_folder "$DATA" \
            --captions_per_epoch 3 \
            --epochs "$EPOCHS" \
            --patience "$EPOCHS" \
            --decoder_lr $lr \
            --lr_schedule cosine \
            --workers 1 \
            --seed "$2" \
            --save_path "$run/$mode$NAME" \
            $FLAGS
        evaluate "$run/$mode$NAME/checkpoint_last.pth" "$run/$mode$NAME"
    done
}
export -f finetune evaluate

for seed in ${SEEDS:-1 2 3}; do
    printf "%s $seed\n" ${MODELS:-gridtd aoa}
done | xargs -P "${JOBS:-1}" -L 1 bash -c '
    echo "$0, seed $1: started, output in $OUT/$0_$1/output.txt"
    bash -euo pipefail -c "finetune $0 $1" ||
        { echo "error: $0, seed $1 failed: see $OUT/$0_$1/output.txt" >&2; exit 1; }'

# variants are not in the tables, and explanations are of the models before fine-tuning
[ -z "$NAME" ] || exit 0
explain() {     # arguments: checkpoint, folder of results, number of images, experiments
    [ "$2/metrics_test.json" -nt "$1" ] || python evaluation.py \
        --weight "$1" \
        --dataset flickr8k \
        --data_folder "$DATA" \
        --methods lrp gradient grad_cam guided_backprop guided_grad_cam attention random \
        --max_images "$3" \
        --save_path "$2" \
        --explanations "${@:4}"
}
for model in ${MODELS:-gridtd aoa}; do
    weight=output/${model}_flickr8k/checkpoint_best.pth
    explain $weight "$OUT/$model" "${MAX_IMAGES:-100}" ablation tpfp deletion_insertion grounding
    explain $weight "$OUT/$model/sanity" 20 sanity
done
python studies/flickr8k/flickr8k.py "$OUT" --data_folder "$DATA"
