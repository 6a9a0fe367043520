#!/usr/bin/env bash
# Trains a model on COCO 2017 with the settings of Sun et al. (2022), by configs/train_flickr30k.sh,
# whose choices can be set here as well:
#     model=aoa features=bottom_up bash configs/train_coco2017.sh
# Arguments are passed on to train.py. The script can be interrupted; running it again resumes.
export dataset=coco2017
export model=${model:-gridtd}                      # or aoa
export features=${features:-vgg16}                 # a CNN, or bottom_up: regions of a detector
export annotations=${annotations:-coco/annotations}   # with instances_*.json, boxes are prepared
export images=${images:-coco}                      # folder of train2017/ and val2017/
exec bash "$(dirname "$0")/train_flickr30k.sh" "$@"
