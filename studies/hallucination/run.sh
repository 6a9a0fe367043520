#!/usr/bin/env bash
# Does fine-tuning with explanations reduce object hallucination? Trains both models on biased demo
# scenes with five random seeds, fine-tunes each in five modes for the same number of steps, and
# evaluates on test images in which the planted companion is missing half the time. Takes hours on
# two cores. If interrupted, run it again: it resumes. Settings (defaults: five seeds, two epochs,
# one job per core):
#     SEEDS="1 2 3" EPOCHS=2 JOBS=2 OUT=output/hallucination bash studies/hallucination/run.sh
# To divide it over machines, give each its own SEEDS or MODELS (gridtd aoa), copy the folders of
# OUT together and run studies/hallucination/hallucination.py. WEIGHTS lists values of μ for which
# evidence erasure is run as well: the trade-off of hallucination and CIDEr. CONTROLS lists
# controls: other evidence (random attention gradient grad_cam shared mask), fillings (mean zero),
# no caption of the erased image (nothing), the whole image (image_swap no_image), erasure in every
# second step (every2), and controls of LRP-inference (temperature permuted). BIAS is the training
# images' bias. A variant of a mode with other flags, beside the existing runs:
#     MODES=lrp NAME=_weight5 FLAGS="--lrp_weight 5" bash studies/hallucination/run.sh
. "$(dirname "$0")/../../configs/environment.sh"
export OMP_NUM_THREADS=1    # one job per core instead
export DATA=data/hallucination
if [ -n "${BIAS:-}" ]; then
    DATA=${DATA}_bias$BIAS
    OUT=${OUT:-output/hallucination_bias$BIAS}
fi
export OUT=${OUT:-output/hallucination}
export EPOCHS=${EPOCHS:-2}
export MODES=${MODES-ce erase lrp cider lrp_cider}
export WEIGHTS=${WEIGHTS:-}
export CONTROLS=${CONTROLS:-}
export NAME=${NAME:-}
export FLAGS=${FLAGS:-}

[ -f "$DATA/demo/test_demo.hdf5" ] || python preparedataset.py \
    --dataset demo \
    --output_folder "$DATA" \
    --demo_size 4000 300 1500 \
    --bias "${BIAS:-0.95}"

evaluate() {    # arguments: folder of a run
    [ -f "$1/metrics_test.json" ] || python evaluation.py \
        --weight "$1/checkpoint_last.pth" \
        --dataset demo \
        --data_folder "$DATA" \
        --workers 0 \
        --save_path "$1"
}

tune() {        # arguments: name of the run, flags; uses $run and $seed of train_and_finetune
    local name=$1 script=finetune.py
    [[ "$*" == *--control* ]] && script=studies/hallucination/tuning_controls.py
    python $script \
        --weight "$run/base/checkpoint_last.pth" \
        --epochs "$EPOCHS" \
        --patience "$EPOCHS" \
        --lr_schedule cosine \
        --workers 1 \
        --seed "$seed" \
        --save_path "$run/$name" \
        "${@:2}"
    evaluate "$run/$name"
}

train_and_finetune() {      # arguments: model type, random seed
    local run=$OUT/$1_$2 seed=$2
    mkdir -p "$run"
    exec >>"$run/output.txt" 2>&1
    model=$1 data=$DATA save_path=$run/base bash configs/train_demo.sh --seed "$2"
    evaluate "$run/base"
    local mu=0.1        # chosen on random seed 1
    [[ $1 == aoa ]] && mu=0.3
    for mode in $MODES; do
        local lr=5e-4
        [[ $mode == *cider ]] && lr=1e-4    # a higher rate degrades the captions' grammar
        tune $mode$NAME --${mode}_tune --erase_weight $mu --decoder_lr $lr $FLAGS
    done
    for weight in $WEIGHTS; do
        tune erase_mu$weight$NAME --erase_tune --erase_weight $weight --decoder_lr 5e-4 $FLAGS
    done
    for control in $CONTROLS; do
        local name=erase_$control flags="--erase_tune --erase_weight $mu"
        case $control in
            random|attention|gradient|grad_cam) flags+=" --erase_evidence $control" ;;
            shared) flags+=" --no-erase_own_evidence" ;;
            mean|zero) flags+=" --erase_fill $control" ;;
            nothing) flags+=" --erase_keep_weight 0" ;;
            every*) flags+=" --erase_every ${control#every}" ;;
            mask|image_swap|no_image) flags+=" --control $control" ;;
            temperature|permuted) name=lrp_$control flags="--lrp_tune --control $control" ;;
            *) echo "unknown control $control" >&2; exit 1 ;;
        esac
        tune $name$NAME $flags --decoder_lr 5e-4 $FLAGS
    done
}
export -f train_and_finetune tune evaluate

for seed in ${SEEDS:-1 2 3 4 5}; do
    printf "%s $seed\n" ${MODELS:-gridtd aoa}
done | xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -L 1 bash -c '
    echo "$0, seed $1: started, output in $OUT/$0_$1/output.txt"
    bash -euo pipefail -c "train_and_finetune $0 $1" ||
        { echo "error: $0, seed $1 failed: see $OUT/$0_$1/output.txt" >&2; exit 1; }'
python studies/hallucination/hallucination.py "$OUT"
