#!/usr/bin/env bash
# Explains a photograph, then runs every stage on generated images: data, training, evaluation,
# explanations and fine-tuning. No GPU is needed. The script can be interrupted; running it again
# resumes. Edit the choices below, or set them as variables: epochs=5 bash configs/demo.sh
scenes=${scenes:-4000}                      # images to train on
epochs=${epochs:-10}                        # of training
finetune_epochs=${finetune_epochs:-2}       # of fine-tuning
seed=${seed:-1}                             # of training and fine-tuning
minutes="6 to 8"                            # that all stages take on two cores
. "$(dirname "$0")/environment.sh"

stage() { echo; echo "== $*"; }
evaluate() {        # a folder with a model, and further flags
    local flags=(--weight "$1/checkpoint_best.pth" --dataset demo --save_path "$1" "${@:2}")
    # a model that names too few absent objects has no estimates, and its page no flags
    python evaluation.py "${flags[@]}" --calibrate || python evaluation.py "${flags[@]}"
}
explain() {
    python explain.py \
        --weight "$1/checkpoint_best.pth" \
        --images data/demo/images/test_0000[0-7].png \
        --methods lrp attention \
        --save_path "$1/explanations"
}

echo "Seven stages: a photograph is explained at once; scenes, training, evaluation, fine-tuning,"
echo "its evaluation and a comparison take $minutes minutes on two cores."

stage "1 of 7: a photograph, captioned and explained by the model in models/"
python explain.py --images docs/figures/cat.jpg --save_path output/photograph
echo "open $PWD/output/photograph/index.html"

stage "2 of 7: $scenes scenes of emoji objects"
[ -f data/demo/test_demo.hdf5 ] ||
    python preparedataset.py --dataset demo --demo_size "$scenes" 500 500

stage "3 of 7: training, $epochs epochs"
model=gridtd bash configs/train_demo.sh \
    --epochs "$epochs" \
    --region_epochs 2 \
    --captions_per_epoch 3 \
    --batch_size 20 \
    --decoder_lr 2e-3 \
    --encoder_lr 2e-3 \
    --seed "$seed"

# beside the fine-tuning, which uses one core; its output appears afterwards
stage "4 and 5 of 7: evaluation and explanations; fine-tuning with evidence erasure"
{
    evaluate output/demo --explanations correctness --max_images 200
    explain output/demo
} > output/demo/evaluation.txt 2>&1 &
background=$!
trap 'kill $background 2>/dev/null || true' EXIT

python finetune.py \
    --weight output/demo/checkpoint_best.pth \
    --erase_tune \
    --epochs "$finetune_epochs" \
    --decoder_lr 5e-4 \
    --lr_schedule cosine \
    --seed "$seed" \
    --workers 1 \
    --save_path output/demo_finetuned

wait $background || { cat output/demo/evaluation.txt >&2; exit 2; }
cat output/demo/evaluation.txt

stage "6 of 7: evaluation and explanations of the fine-tuned model"
evaluate output/demo_finetuned
explain output/demo_finetuned

stage "7 of 7: what fine-tuning changed"
python studies/before_after/before_after.py output/demo output/demo_finetuned

echo "open $PWD/output/demo/explanations/index.html (before fine-tuning) and"
echo "open $PWD/output/demo_finetuned/explanations/index.html (after it)"
echo "$PWD/output/demo $PWD/output/demo_finetuned"
